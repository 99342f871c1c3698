"""Moto's server with atomic conditional writes, as S3 has them: moto's own check and write may interleave between its threads.

python tests/atomic_moto.py -H HOST -p PORT
"""

import threading
from collections.abc import Iterable
from typing import Any

from moto import server
from moto.moto_server.werkzeug_app import DomainDispatcherApplication

_WRITING = threading.Lock()
_answer = DomainDispatcherApplication.__call__


def answer(application: DomainDispatcherApplication, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Answer a request; those with `If-None-Match` one at a time."""
    if "HTTP_IF_NONE_MATCH" not in environ:
        return _answer(application, environ, start_response)
    with _WRITING:
        return list(_answer(application, environ, start_response))


if __name__ == "__main__":
    DomainDispatcherApplication.__call__ = answer  # type: ignore[method-assign]
    server.main()
