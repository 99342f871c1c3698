"""Access to a run's checkpoints in tests."""

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.store import Storage
from recsys.train.checkpoints.checkpoint_store import CheckpointStore


def store_of(config: Config) -> CheckpointStore:
    """Open the checkpoints of a config's run with token 0, which is not an owner and may not publish while the run has one."""
    storage = Storage.from_config(config.storage)
    return CheckpointStore(storage, config, Dataset.open(storage, config.data.dataset))
