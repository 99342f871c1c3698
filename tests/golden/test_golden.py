"""Values that must not change unintentionally: the demo's resolved config and the first losses of a small run.

After an intended change, regenerate them: python -m tests.golden.test_golden
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.loop import Trainer
from tests.datasets import make_dataset, small_config
from tests.distributed import run_distributed
from tests.reporters import LocalReporter

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def resolved_config() -> dict[str, Any]:
    """Return the demo's config without values that depend on the machine."""
    return load_config(ROOT / "jobs/configs/demo.toml").model_dump(mode="json", exclude={"storage": {"root"}, "run": {"scratch"}})


def loss_curve(folder: Path) -> list[list[float]]:
    """Train ten steps on a small dataset."""
    dataset = make_dataset(Storage(str(folder / "store")))
    return run_distributed(run, 1, small_config(dataset, folder, training__max_steps=10))[0]


def run(config: Config) -> list[list[float]]:
    reporter = LocalReporter()
    Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), reporter, NextItem).run()
    return [list(losses.values()) for losses in reporter.losses]


def test_the_demo_resolves_to_what_it_did() -> None:
    assert resolved_config() == json.loads((FOLDER / "demo.json").read_text())


def test_the_loss_curve_is_what_it_was(tmp_path: Path) -> None:
    np.testing.assert_allclose(loss_curve(tmp_path), json.loads((FOLDER / "loss_curve.json").read_text()), rtol=1e-4)


if __name__ == "__main__":
    (FOLDER / "demo.json").write_text(json.dumps(resolved_config(), indent=1) + "\n")
    with TemporaryDirectory() as temporary:
        (FOLDER / "loss_curve.json").write_text(json.dumps(loss_curve(Path(temporary)), indent=1) + "\n")
