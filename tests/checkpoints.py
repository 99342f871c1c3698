"""The checkpoints of a run, as tests look at them."""

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.store import Storage
from recsys.train.checkpoints.checkpoint_store import CheckpointStore


def store_of(config: Config) -> CheckpointStore:
    """Open the checkpoints of a config's run, as nobody's who may publish."""
    storage = Storage.from_config(config.storage)
    return CheckpointStore(storage, config, Dataset.open(storage, config.data.dataset))
