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
    """One replica. A batch is answered from one version as a whole, so no answer mixes two."""

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
        """Serve `user_config["version"]`, loaded beside the old one; a version that cannot be loaded leaves the old one in place."""
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
            logger.exception("%s; %s goes on", self._refusal, self._answerer.info.version)
            return
        self._answerer = loaded
        logger.info("serving version %s", version)

    @ray.serve.batch  # type: ignore[untyped-decorator]
    async def recommend(self, requests: list[RecommendRequest]) -> list[Answer]:
        """Answer requests that came at about the same time. Not in a thread: the thread count set above is this thread's own."""
        return self._loaded.recommend(requests)

    @ray.serve.batch  # type: ignore[untyped-decorator]
    async def score(self, requests: list[ScoreRequest]) -> list[Answer]:
        """Answer requests that came at about the same time."""
        return self._loaded.score(requests)

    async def describe(self) -> Answer:
        """Return what is served."""
        return Answer.of(self._loaded.info)

    async def status(self) -> dict[str, str | None]:
        """Return the version that is served, and why a newer one is not."""
        return {"version": self._loaded.info.version, "refusal": self._refusal}

    async def check_health(self) -> None:
        """Raise where this replica could not answer: Ray Serve replaces it then."""
        self._loaded.check()

    @property
    def _loaded(self) -> Answerer:
        if self._answerer is None:
            raise RuntimeError("no version is loaded")
        return self._answerer
