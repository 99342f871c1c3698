"""All private names of Ray Serve that this project uses, for lack of public ones. A test fails when one of them moves."""

from ray.serve.context import _get_global_client


def serve_http_port() -> int:
    """Return the HTTP port of Ray Serve on this cluster."""
    return int(_get_global_client().http_config.port)
