"""Tell what a worker's memory will hold, by part, without starting one; `jobs.train` holds the same plan against what there is."""

import logging
from typing import Any

from recsys.command import run_verb
from recsys.config import Config

logger = logging.getLogger(__name__)


def run(config: Config) -> dict[str, Any]:
    """Plan the memory of each of `training.num_workers` workers; of an elastic run, of the fewest, who hold the most."""
    import torch

    from recsys.data.manifest import Dataset
    from recsys.model.activations import recompute_activations
    from recsys.model.catalogue_text import ALONE
    from recsys.storage import Storage
    from recsys.train.memory import plan_step
    from recsys.train.recommending import Recommending

    training = config.training
    dataset = Dataset.open(Storage.from_config(config.storage), config.data.dataset)
    micro_batches = training.accumulation_steps(training.min_workers)
    alone = {  # one worker's share of a step
        "training.num_workers": 1,
        "training.global_batch_size": training.micro_batch_size * micro_batches,
    }
    trainable = Recommending(dataset.adopt(config.with_values(alone)), dataset, torch.device("cpu"), ALONE)
    if training.recompute_activations:
        recompute_activations(trainable.module)
    plan = plan_step(trainable.module, next(iter(trainable.steps(0))), training, training.min_workers)
    logger.info("memory of each of %d workers, by part:\n%s", training.min_workers, plan.table())
    return {"num_workers": training.min_workers, "zero_stage": training.zero_stage, "peak_bytes": plan.peak_bytes, **plan.as_dict()}


if __name__ == "__main__":
    run_verb("jobs.plan_memory", run, __doc__)
