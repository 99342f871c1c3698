"""A run that starts from another run's weights and replays old samples: killed at any time, it equals an uninterrupted one."""

from pathlib import Path

import pytest

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.train.checkpoints.manifest import read_manifest
from recsys.train.loop import Trainer
from tests.checkpoints import store_of
from tests.datasets import open_dataset, small_config
from tests.distributed import run_distributed, run_until_killed
from tests.reporters import LocalReporter
from tests.resume.ledger import Recording, order_kills, read_ledger
from tests.versions import make_versions

EPOCHS, EVERY = 3, 3


def train(config: Config) -> int:
    Path(config.run.scratch).mkdir(mode=0o700, parents=True, exist_ok=True)
    return Trainer(config, open_dataset(config), LocalReporter(), Recording).run().step


def run_config(dataset: Dataset, folder: Path, name: str, **values: object) -> Config:
    own = {"training__num_workers": 2, "training__micro_batch_size": 8, "training__epochs": EPOCHS, "checkpoint__every_steps": EVERY}
    own |= {"run__name": name, "training__early_stopping_patience": None, "model__dropout": 0.1}
    return dataset.complete(small_config(dataset, folder / name, **own | values))


@pytest.mark.parametrize("keep_optimizer", [False, True])
def test_a_killed_warm_run_equals_an_undisturbed_one(tmp_path: Path, keep_optimizer: bool) -> None:
    first, second = make_versions(tmp_path)
    source = run_config(first, tmp_path, "source", training__epochs=1)
    start = store_of(source).uri(run_distributed(train, 2, source)[0])
    warm = {"training__start_from": start, "training__replay": 0.5, "training__keep_optimizer": keep_optimizer}
    undisturbed, killed = (run_config(second, tmp_path, name, **warm) for name in ("undisturbed", "killed"))
    num_steps = run_distributed(train, 2, undisturbed)[0]

    scratch = Path(killed.run.scratch)
    order_kills(scratch, [(1, EVERY - 1), (0, num_steps - 2)])
    run_until_killed(train, 2, killed)
    assert store_of(killed).steps() == []
    run_until_killed(train, 2, killed)
    assert store_of(killed).steps() != []
    first.storage.delete_tree(start)  # it is not read again
    assert run_distributed(train, 2, killed)[0] == num_steps
    hashes = [
        {file.path: file.sha256 for file in read_manifest(second.storage, store_of(config).uri(num_steps)).files}
        for config in (undisturbed, killed)
    ]
    assert hashes[0] == hashes[1]
    ledgers = [read_ledger(Path(config.run.scratch), 2)[0] for config in (undisturbed, killed)]
    assert ledgers[0] == ledgers[1]
    num_old = first.manifest.num_samples
    num_new = second.manifest.num_samples - num_old
    drawn = []
    for epoch in range(EPOCHS):
        per_epoch = num_steps // EPOCHS
        ids = [sample for (_, step), samples in ledgers[0].items() if step // per_epoch == epoch for sample in samples]
        assert sorted(sample for sample in ids if sample >= num_old) == list(range(num_old, num_old + num_new))
        drawn.append({sample for sample in ids if sample < num_old})
        assert len(ids) - num_new == len(drawn[-1]) == round(0.5 * num_new)
    assert len(set(map(frozenset, drawn))) == EPOCHS

    other = killed.with_values({"training.start_from": start.replace("source", "another")})
    with pytest.raises(UserError, match=r"training\.start_from: "):
        store_of(other).check_compatible(read_manifest(second.storage, store_of(killed).uri(num_steps)))
