"""Ray Train with DeepSpeed as in their documentation: every few steps a DeepSpeed checkpoint is reported to Ray Train, which restarts.

Run as `python -m tests.benchmarks.peers.plain_ray_train --set ...`, with the config of `jobs.train`. The model, its batches and the
private Ray are ours; the loop, the checkpoints and the restarts are not. Files in `run.scratch`: `ledger-{rank}` as in
`tests.resume.ledger`, `events-{rank}` with the times when a worker started and had loaded, and `kill-{rank}-{step}`.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from recsys.config import Config
from recsys.launch.command import run_verb


def run(config: Config) -> dict[str, Any]:
    """Train; Ray Train restarts workers that die."""
    from recsys.launch.head import connect
    from tests.benchmarks.peers.plain_ray_train import train_loop

    with connect(config):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"config": config.model_dump_json()},
            scaling_config=ScalingConfig(num_workers=config.training.max_workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name=config.run.name, storage_path=f"{config.run.scratch}/results", failure_config=FailureConfig(max_failures=100)
            ),
            torch_config=TorchConfig(backend="gloo"),
        )
        begin = time.monotonic()
        trainer.fit()
    return {"run": config.run.name, "seconds": time.monotonic() - begin}


def train_loop(settings: dict[str, str]) -> None:
    import deepspeed
    import ray.train
    import torch
    import torch.distributed as dist

    from recsys.data.manifest import Dataset
    from recsys.model.text.catalogue_text import Ranks
    from recsys.objectives.next_item import NextItem
    from recsys.store import Storage
    from tests.resume.ledger import die_where_told

    config = Config.model_validate(json.loads(settings["config"]))
    rank, scratch = ray.train.get_context().get_world_rank(), Path(config.run.scratch)

    def note(file: str, **entry: Any) -> None:
        with (scratch / f"{file}-{rank}").open("a") as stream:
            stream.write(json.dumps({**entry, "time": time.time()}) + "\n")

    note("events", event="started")
    dataset = Dataset.open(Storage.from_config(config.storage), config.data.dataset)
    objective = NextItem(dataset.complete(config), dataset, torch.device("cpu"), Ranks(rank, dist.get_world_size(), dist.barrier))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise it compiles for half a minute; ours avoids this too
    engine, *_ = deepspeed.initialize(
        model=objective.module,
        optimizer=torch.optim.AdamW(objective.module.parameters(), lr=config.optimizer.learning_rate),
        config={
            "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
            "gradient_clipping": config.optimizer.clip_norm,
            "zero_optimization": {"stage": config.training.zero_stage, "reduce_bucket_size": 1_000_000},
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    first_step = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            first_step = engine.load_checkpoint(folder)[1]["step"]
    note("events", event="loaded")
    num_steps = config.training.epochs * objective.plan(0).num_steps
    steps = (batches for epoch in range(config.training.epochs) for batches in objective.steps(epoch))
    for step, batches in zip(range(num_steps), steps, strict=False):
        if step < first_step:
            continue
        note("ledger", step=step, ids=[sample for batch in batches for sample in batch.sample_ids.tolist()])
        die_where_told(scratch, rank, step)
        for batch in batches:
            engine.backward(torch.stack([loss.float() for loss in engine(batch).values()]).sum() / len(batch.sample_ids))
            engine.step()
        if (step + 1) % config.checkpoint.every_steps == 0 or step + 1 == num_steps:
            with tempfile.TemporaryDirectory() as folder:
                engine.save_checkpoint(folder, client_state={"step": step + 1})
                dist.barrier()
                ray.train.report({"step": step + 1}, checkpoint=ray.train.Checkpoint.from_directory(folder))


if __name__ == "__main__":
    run_verb("jobs.train", run, __doc__)
