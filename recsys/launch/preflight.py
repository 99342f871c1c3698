"""Checks before any worker starts: can this run be trained and validated?"""

from pathlib import Path

from recsys.config import Config
from recsys.data.labels import read_groups
from recsys.data.manifest import Dataset
from recsys.evaluation.users import refuse_no_users
from recsys.model.text.backbones import check_backbone
from recsys.model.text.pretraining import check_objectives
from recsys.store import Storage


def check_training(config: Config, *text_modes: str) -> None:
    """Check a run of `jobs.train`, or a search over `text_modes`, within seconds.

    Raises:
        UserError: the dataset contradicts the config, no user can be validated, or the language model cannot be used.
    """
    storage = Storage.from_config(config.storage)
    dataset = Dataset.open(storage, config.data.dataset)
    config = dataset.adopt(config)
    refuse_no_users(dataset, "validation")
    if config.fairness.attribute:
        read_groups(dataset, config.fairness.attribute)
    for mode in dict.fromkeys(text_modes or (config.model.text.mode,)):
        _check_backbone(config, storage, mode)


def check_pretraining(config: Config) -> None:
    """Check a run of `jobs.pretrain`, whose language model learns whatever `model.text.mode` is.

    Raises:
        UserError: there is no such dataset, or the language model cannot be used.
    """
    storage = Storage.from_config(config.storage)
    Dataset.open(storage, config.data.dataset).adopt(config)
    folder = _check_backbone(config, storage, "full")
    if folder is not None:
        check_objectives(config, folder)


def _check_backbone(config: Config, storage: Storage, mode: str) -> str | None:
    text = config.with_values({"model.text.mode": mode}).model.text
    return check_backbone(text, storage, Path(config.run.scratch))
