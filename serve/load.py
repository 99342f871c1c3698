"""Measure a running service: latency, answers per second and errors at several numbers of clients."""

from typing import Any

from recsys.config import Config
from recsys.launch.command import run_verb


def run(config: Config) -> dict[str, Any]:
    """Measure with each number of `load.clients`."""
    from serve.measuring import measure_service

    return measure_service(config)


if __name__ == "__main__":
    run_verb("serve.load", run, __doc__)
