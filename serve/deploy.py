"""Deploy the service on the cluster that RAY_ADDRESS names; run it again to put a new version in service."""

import os
from typing import Any

from recsys.config import Config
from recsys.errors import UserError
from recsys.launch.command import run_verb
from recsys.launch.head import ADDRESS


def run(config: Config) -> dict[str, Any]:
    """Deploy the version that `service.alias` names and wait until it answers."""
    check_address()
    from serve.rollout import roll_out

    return roll_out(config)


def check_address() -> None:
    """Refuse to go on without a running cluster.

    Raises:
        UserError: `RAY_ADDRESS` is not set.
    """
    if not os.environ.get(ADDRESS):
        raise UserError(
            f"{ADDRESS}: is not set, and a service must outlive the command that starts it; set it to a running cluster's address, "
            "or keep a service in the foreground by serve run serve.app:build_app"
        )


if __name__ == "__main__":
    run_verb("serve.deploy", run, __doc__)
