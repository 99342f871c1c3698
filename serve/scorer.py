"""The scorer deployment: replicas that hold one exported version and answer batches of requests from it."""

import asyncio
import logging
from pathlib import Path

import ray.serve
import torch

from recsys.config import Config
from recsys.exports.registry import Registry
from recsys.store import Storage
from serve.answering import Answerer
from serve.protocol import Answer, RecommendRequest, ScoreRequest

logger = logging.getLogger("ray.serve")


class Scorer:
    """One replica. Each batch is answered from one version, so no answer mixes two versions."""

    def __init__(self, config: Config) -> None:
        service = config.service
        torch.set_num_threads(max(1, int(service.cpus_per_replica)))
        for method in (self.recommend, self.score):
            method.set_max_batch_size(service.max_batch_size)
            method.set_batch_wait_timeout_s(service.batch_wait_seconds)
        self._service = service
        self._registry = Registry(Storage.from_config(config.storage), config.served_export)
        self._scratch = Path(config.run.scratch) / "served"
        self._answerer: Answerer | None = None
        self._refusal: str | None = None

    async def reconfigure(self, user_config: dict[str, str]) -> None:
        """Load `user_config["version"]` while the old version serves, then swap; if loading fails, the old version stays in service."""
        version = user_config["version"]
        self._refusal = None
        if self._answerer is not None and self._answerer.info.version == version:
            return
        try:
            loaded = await asyncio.to_thread(Answerer.load, self._registry, version, self._service.alias, self._scratch)
            loaded.check()
        except Exception as error:
            if self._answerer is None:
                raise
            self._refusal = f"version {version} cannot be served: {' '.join(str(error).split())}"
            logger.exception("%s; %s keeps serving", self._refusal, self._answerer.info.version)
            return
        self._answerer = loaded
        logger.info("serving version %s", version)

    @ray.serve.batch  # type: ignore[untyped-decorator]
    async def recommend(self, requests: list[RecommendRequest]) -> list[Answer]:
        """Answer a batch of requests; not in another thread, since torch's thread count was set for this thread only."""
        return self._loaded.recommend(requests)

    @ray.serve.batch  # type: ignore[untyped-decorator]
    async def score(self, requests: list[ScoreRequest]) -> list[Answer]:
        """Answer a batch of requests."""
        return self._loaded.score(requests)

    async def describe(self) -> Answer:
        """Return the `ModelInfo` of the served version."""
        return Answer.of(self._loaded.info)

    async def status(self) -> dict[str, str | None]:
        """Return the served version, and the reason if a newer one was refused."""
        return {"version": self._loaded.info.version, "refusal": self._refusal}

    async def check_health(self) -> None:
        """Raise if this replica cannot answer; Ray Serve then replaces it."""
        self._loaded.check()

    @property
    def _loaded(self) -> Answerer:
        if self._answerer is None:
            raise RuntimeError("no version is loaded")
        return self._answerer
