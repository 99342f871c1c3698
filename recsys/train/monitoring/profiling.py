"""Profiles a few steps: a trace and a table."""

import logging
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from recsys.config import Config
from recsys.store import Storage, private_folder

logger = logging.getLogger(__name__)
SETTLING_STEPS = 5
"""First steps, which are not profiled: they allocate memory, compile and fill caches."""

TABLE_ROWS = 40


def step_profiler(config: Config, storage: Storage) -> Any:
    """Return a profiler of `training.profile_steps` steps of this process, which then writes `runs/{run}/profile/`."""
    use_gpu, num_steps = config.training.use_gpu, config.training.profile_steps
    target = storage.uri("runs", config.run.name, "profile")

    def write(profiler: Any) -> None:
        folder = private_folder(Path(config.run.scratch) / "profile" / config.run.name)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        key = "self_device_time_total" if use_gpu else "self_cpu_time_total"
        (folder / "table.txt").write_text(profiler.key_averages().table(sort_by=key, row_limit=TABLE_ROWS), encoding="utf-8")
        for name in ("trace.json.gz", "table.txt"):
            storage.upload(folder / name, f"{target}/{name}")
        logger.info("profile: %s has a trace for chrome://tracing or Perfetto, and a table of where the time went", target)

    return profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * use_gpu,
        schedule=schedule(wait=SETTLING_STEPS, warmup=1, active=num_steps, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
    )
