"""A check whether a server that a test or a benchmark has started is ready."""

import urllib.error
import urllib.request


def answers(endpoint: str) -> bool:
    """Return whether an HTTP server answers, with any status."""
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # an unsigned request that is refused is an answer too
    except OSError:
        return False
    return True
