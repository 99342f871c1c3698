"""An additional node of a Ray on loopback, as a process that ends with its node: `python -m tests.faults.ray_node ADDRESS`.

`ray start` cannot add a second node to a Ray that is restricted to loopback.
"""

import sys
import time


def main() -> None:
    """Start a node with room for one worker, and keep running."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    parameters = RayParams(
        gcs_address=sys.argv[1],
        redis_address=sys.argv[1],
        node_ip_address="127.0.0.1",
        num_cpus=1,
        num_gpus=0,
        object_store_memory=100 << 20,
        node_manager_port=0,
        min_worker_port=0,
        max_worker_port=0,
        include_log_monitor=False,
        dashboard_agent_listen_port=None,
    )
    Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=False)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
