"""Pretrain the language model on the catalogue's texts and publish it for `jobs.train`; the same command resumes it."""

from pathlib import Path
from typing import Any

from recsys.config import Config
from recsys.launch.command import run_verb


def run(config: Config) -> dict[str, Any]:
    """Pretrain `model.text.backbone` on `data.dataset` with the sections `pretraining`, `training` and `optimizer`."""
    from recsys.launch.checks import check_pretraining  # imported here so that config errors wait for nothing

    check_pretraining(config)
    from recsys.launch.driver import launch  # imports torch
    from recsys.objectives.text_pretraining import TextPretraining
    from recsys.store import Storage
    from recsys.train.checkpoints.backbone import publish_backbone

    own = {"run.name": f"{config.run.name}/pretraining", "training.start_from": "", "training.keep_optimizer": False}
    result = launch(config.with_values(own), TextPretraining)
    backbone = publish_backbone(Storage.from_config(config.storage), result["checkpoint"], Path(config.run.scratch))
    return result | {"run": config.run.name, "backbone": backbone}


if __name__ == "__main__":
    run_verb("jobs.pretrain", run, __doc__)
