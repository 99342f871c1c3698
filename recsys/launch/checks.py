"""Checks of a run's data and model before any worker starts. torch is imported only after the data is checked."""

from pathlib import Path

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.evaluation.decisions.refusals import refuse_absent_metrics, refuse_unknown_tasks
from recsys.store import Storage
from recsys.train.checkpoints.start_address import check_start


def check_training(config: Config, *text_modes: str) -> None:
    """Check dataset, validation users, their metrics and the language model for `jobs.train`, or for a search over `text_modes`."""
    storage = Storage.from_config(config.storage)
    dataset = Dataset.open(storage, config.data.dataset)
    config = dataset.complete(config)
    refuse_absent_metrics(dataset, "validation", config.evaluation)
    refuse_unknown_tasks(dataset, config)
    if dataset.manifest.has_exposures and config.training.shuffle_histories:
        raise UserError("training.shuffle_histories = true: an exposure has what was before it as history; set it to false")
    if config.fairness.attribute:
        from recsys.data.labels.training import read_groups

        read_groups(dataset, config.fairness.attribute)
    if config.training.replay is not None:
        _check_replay(dataset)
    check_start(storage, config)
    for mode in dict.fromkeys(text_modes or (config.model.text.mode,)):
        _check_backbone(config, storage, mode)


def check_pretraining(config: Config) -> None:
    """Check dataset and language model for `jobs.pretrain`, which trains the model for any `model.text.mode`."""
    storage = Storage.from_config(config.storage)
    Dataset.open(storage, config.data.dataset).complete(config)
    folder = _check_backbone(config, storage, "full")
    if folder is not None:
        from recsys.model.text.pretraining import check_objectives

        check_objectives(config, folder)


def _check_replay(dataset: Dataset) -> None:
    """Raise a UserError if no older version is there to be replayed, or the newest has no samples."""
    if dataset.manifest.version == 1:
        raise UserError(
            f"training.replay: {dataset.uri} is the first version of its data, so there is nothing to replay; append to it "
            "(data.base), or leave training.replay out"
        )
    if not any(shard.num_rows for shard in dataset.manifest.train_shards if not shard.dataset):
        raise UserError(f"training.replay: {dataset.uri} adds no training sample to its base; leave training.replay out")


def _check_backbone(config: Config, storage: Storage, mode: str) -> str | None:
    from recsys.model.text.backbones import check_backbone

    text = config.with_values({"model.text.mode": mode}).model.text
    return check_backbone(text, storage, Path(config.run.scratch))
