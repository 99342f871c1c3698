"""Stop the service that the pipeline left running on this machine, and its local Ray head."""

from typing import Any

from recsys.config import Config
from recsys.launch.command import run_verb
from recsys.launch.head import stop_local_head


def run(config: Config) -> dict[str, Any]:
    """Stop the Ray head that is recorded in `run.scratch`."""
    return {"stopped": stop_local_head(config)}


if __name__ == "__main__":
    run_verb("serve.stop", run, __doc__)
