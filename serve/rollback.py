"""Roll the service back: point the alias to its version before the current one and put that in service."""

from typing import Any

from recsys.config import Config
from recsys.launch.command import run_verb
from serve.deploy import check_address


def run(config: Config) -> dict[str, Any]:
    """Roll back the alias and the running service."""
    check_address()
    from serve.rollout import roll_back

    return roll_back(config)


if __name__ == "__main__":
    run_verb("serve.rollback", run, __doc__)
