"""Predict the memory of a worker, by part, without starting one; `jobs.train` makes the same prediction before its first step."""

import logging
from typing import Any

from recsys.config import Config
from recsys.launch.command import run_verb

logger = logging.getLogger(__name__)


def run(config: Config) -> dict[str, Any]:
    """Plan the memory of each of `training.num_workers` workers; in an elastic run, of the fewest workers, which hold the most each."""
    import torch

    from recsys.data.manifest import Dataset
    from recsys.model.text.catalogue_text import SINGLE_PROCESS
    from recsys.model.user_encoder import recompute_activations
    from recsys.objectives.next_item import NextItem
    from recsys.store import Storage
    from recsys.train.memory_plan import plan_step

    training = config.training
    dataset = Dataset.open(Storage.from_config(config.storage), config.data.dataset)
    micro_batches = training.accumulation_steps(training.min_workers)
    alone = {  # one worker's share of a step
        "training.num_workers": 1,
        "training.global_batch_size": training.micro_batch_size * micro_batches,
    }
    objective = NextItem(dataset.complete(config.with_values(alone)), dataset, torch.device("cpu"), SINGLE_PROCESS)
    if training.recompute_activations:
        recompute_activations(objective.module)
    plan = plan_step(objective.module, next(iter(objective.steps(0))), training, training.min_workers)
    logger.info("memory of each of %d workers, by part:\n%s", training.min_workers, plan.table())
    of = {"num_workers": training.min_workers, "zero_stage": training.zero_stage}
    return {**of, "peak_bytes": plan.peak_bytes, "parts": plan.parts, **plan.phases}


if __name__ == "__main__":
    run_verb("jobs.plan_memory", run, __doc__)
