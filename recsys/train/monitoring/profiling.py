"""Profiles a few steps: a trace and a table."""

import logging
from pathlib import Path
from typing import Any, Self

from torch.profiler import ProfilerActivity, profile, schedule

from recsys.config import Config
from recsys.store import Storage, private_folder

logger = logging.getLogger(__name__)
SETTLING_STEPS = 5
"""First steps that are not profiled: they allocate, compile and fill caches."""

TABLE_ROWS = 40


class Profile:
    """Profiles `training.profile_steps` steps of this process, then writes `runs/{run}/profile/`. As a context, around the steps."""

    def __init__(self, config: Config, storage: Storage) -> None:
        self._target = storage.uri("runs", config.run.name, "profile")
        self._storage, self._folder = storage, Path(config.run.scratch) / "profile" / config.run.name
        self._key = "self_device_time_total" if config.training.use_gpu else "self_cpu_time_total"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * config.training.use_gpu
        self._profiler: Any = profile(
            activities=activities,
            schedule=schedule(wait=SETTLING_STEPS, warmup=1, active=config.training.profile_steps, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )

    def __enter__(self) -> Self:
        """Begin to count steps."""
        self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End; a run of too few steps leaves what it has."""
        self._profiler.stop()

    def step(self) -> None:
        """Tell that a step ended."""
        self._profiler.step()

    def _write(self, profiler: Any) -> None:
        folder = private_folder(self._folder)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        table = profiler.key_averages().table(sort_by=self._key, row_limit=TABLE_ROWS)
        (folder / "table.txt").write_text(table, encoding="utf-8")
        for name in ("trace.json.gz", "table.txt"):
            self._storage.upload(folder / name, f"{self._target}/{name}")
        logger.info("profile: %s has a trace for chrome://tracing or Perfetto, and a table of where the time went", self._target)
