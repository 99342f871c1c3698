"""Lost and added nodes on a real Ray with several nodes: the run waits for another node, or continues with the remaining workers."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from recsys.data.manifest import Dataset
from recsys.launch.head import Head, start_head, stop_head
from recsys.store import Storage
from tests.conftest import kill_descendants
from tests.datasets import make_dataset
from tests.resume.ledger import read_ledger
from tests.resume.runs import EPOCHS, Run, assert_same, steps_per_epoch

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("nodes") / "store")), num_users=300)


class Nodes:
    """A Ray on loopback: a head with room for one worker, and other nodes with room for one each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.head: Head = start_head(str(folder), num_cpus=1, ends_with_parent=True)
        self.others: list[subprocess.Popen[bytes]] = []

    def add(self) -> "subprocess.Popen[bytes]":
        """Start a node in a separate process group."""
        command = [sys.executable, "-m", "tests.faults.ray_node", self.head.address]
        with (self.folder / "node.log").open("ab") as log:
            environment = {**os.environ, **self.head.environment}
            node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.others.append(node)
        return node

    def close(self) -> None:
        for node in self.others:
            kill_node(node)
        stop_head(self.head.process_id)


def kill_node(node: "subprocess.Popen[bytes]") -> None:
    """Kill a node and all its processes at once."""
    if node.poll() is None:
        for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    node.wait()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # pytest's paths may be too long for sockets
        found = Nodes(Path(folder))
        found.add()
        yield found
        found.close()
    kill_descendants("tests.resume.ledger")


def wait_until(run: Run, what: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, run.log.read_text()[-4000:]
        time.sleep(0.2)


def num_ranks(run: Run, after_step: int) -> int:
    """Count the ranks that have started a step after the given one."""
    paths = [run.scratch / f"ledger-{rank}" for rank in range(2)]
    return sum(path.exists() and last_step(path) > after_step for path in paths)


def last_step(path: Path) -> int:
    lines = path.read_text().splitlines()
    return int(lines[-1].partition('"step": ')[2].partition(",")[0]) if lines else -1


def test_a_run_waits_for_another_node_where_one_was_killed(dataset: Dataset, nodes: Nodes, tmp_path: Path) -> None:
    undisturbed = Run(dataset, tmp_path, "undisturbed")
    undisturbed.finish()
    run = Run(dataset, tmp_path, "node-killed")
    run.set_pace(0.1)
    process = run.start(nodes.head.environment)
    run.wait_for_checkpoint(process, above_step=0)
    kill_node(nodes.others[0])
    time.sleep(2)
    nodes.add()
    run.set_pace(0)
    result = run.finish(process)
    assert_same(run, undisturbed)
    incidents = result["incidents"]
    assert {incident["causes"][-1]["kind"] for incident in incidents} == {"node_lost"}
    assert incidents
    print(f"from the checkpoint before to the first new step: {[incident['seconds'] for incident in incidents]} s")


def test_notice_that_a_node_will_be_taken_away_saves_the_step_under_way(dataset: Dataset, nodes: Nodes, tmp_path: Path) -> None:
    undisturbed = Run(dataset, tmp_path, "undisturbed-too")
    undisturbed.finish()
    run = Run(dataset, tmp_path, "noticed", checkpoint__every_steps=10_000)
    run.set_pace(0.5)
    process = run.start(nodes.head.environment)
    wait_until(run, lambda: num_ranks(run, 2) == 2)
    noticed = last_step(run.scratch / "ledger-0")
    give_notice(nodes, seconds=120)
    run.wait_for_checkpoint(process, above_step=noticed)
    kill_node(nodes.others[0])
    nodes.add()
    run.set_pace(0)
    result = run.finish(process)
    assert_same(run, undisturbed)
    assert noticed < run.resumed_steps()[0] < steps_per_epoch(dataset)  # where no checkpoint was due
    print([(incident["causes"][-1]["kind"], round(incident["seconds"], 1)) for incident in result["incidents"]])


def give_notice(nodes: Nodes, seconds: int) -> None:
    """Announce to Ray, as a cloud does, that the node other than the head will be removed."""
    environment = {**os.environ, **nodes.head.environment}
    script = "import ray; ray.init(); print(next(n['NodeID'] for n in ray.nodes() if 'node:__internal_head__' not in n['Resources']))"
    node = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True).stdout.split()[-1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={nodes.head.address}", f"--node-id={node}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=as a cloud would", f"--deadline-remaining-seconds={seconds}"]
    subprocess.run(command, env=environment, check=True, capture_output=True)


def test_an_elastic_run_goes_on_with_the_nodes_that_are_there(dataset: Dataset, nodes: Nodes, tmp_path: Path) -> None:
    run = Run(dataset, tmp_path, "elastic", **{"training__num_workers": "[1, 2]", "model__dropout": 0.0})
    run.set_pace(0.2)
    process = run.start(nodes.head.environment)
    wait_until(run, lambda: num_ranks(run, 2) == 2)
    run.wait_for_checkpoint(process, above_step=0)
    kill_node(nodes.others[0])
    before = last_step(run.scratch / "ledger-1")
    wait_until(run, lambda: num_ranks(run, before) == 1 and last_step(run.scratch / "ledger-0") > before + 5)
    nodes.add()
    alone = last_step(run.scratch / "ledger-1")
    run.set_pace(1)
    wait_until(run, lambda: last_step(run.scratch / "ledger-1") > alone)
    run.set_pace(0)
    result: dict[str, Any] = run.finish(process)
    kinds = [incident["causes"][-1]["kind"] for incident in result["incidents"]]
    assert kinds[-1] == "resized"
    assert kinds[0] == "node_lost"
    assert len(kinds) >= 2
    ledger, _ = read_ledger(run.scratch, 2)
    for epoch in range(EPOCHS):
        ids = [sample for (_, step), ids in ledger.items() if step // steps_per_epoch(dataset) == epoch for sample in ids]
        assert set(ids) == set(range(dataset.manifest.num_samples))
    print([(incident["causes"][-1]["kind"], round(incident["seconds"], 1)) for incident in result["incidents"]])
