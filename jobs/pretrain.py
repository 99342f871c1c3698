"""Pretrain the language model on the catalogue's texts, and publish it as a start for `jobs.train`; the same command again goes on."""

from pathlib import Path
from typing import Any

from recsys.command import run_verb
from recsys.config import Config


def run(config: Config) -> dict[str, Any]:
    """Pretrain `model.text.backbone` on `data.dataset`, by `pretraining`, `training` and `optimizer`."""
    from recsys.train.preflight import check_pretraining  # after the config is checked: a mistake shall not wait for torch to load

    check_pretraining(config)
    from recsys.launch import launch  # a mistake in data or model shall not wait for Ray to load
    from recsys.storage import Storage
    from recsys.train.backbone import publish_backbone
    from recsys.train.pretraining import Pretraining

    result = launch(config.with_values({"run.name": f"{config.run.name}/pretraining"}), make=Pretraining)
    backbone = publish_backbone(Storage.from_config(config.storage), result["checkpoint"], Path(config.run.scratch))
    return result | {"run": config.run.name, "backbone": backbone}


if __name__ == "__main__":
    run_verb("jobs.pretrain", run, __doc__)
