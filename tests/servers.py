"""Whether a server that a test or a benchmark has started answers yet."""

import urllib.error
import urllib.request


def answers(endpoint: str) -> bool:
    """Tell whether an HTTP server answers, with whatever status."""
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # refusing an unsigned request is an answer
    except OSError:
        return False
    return True
