"""The replicas of the service: each holds one exported version and answers HTTP requests in batches from it."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import FastAPI

from recsys.config import Config
from serve.api.gateway import build_http_app
from serve.api.problems import Answer, RefusedError, busy
from serve.api.protocol import Message, ModelInfo
from serve.batcher import Batcher, Timed
from serve.live.changes import Change, ChangeLog
from serve.live.follower import UNREACHABLE, Follower, open_log
from serve.live.users import LiveUsers

if TYPE_CHECKING:  # commands that only name this class do not wait for PyTorch
    from serve.answers.answering import Answerer

STUCK_SECONDS = 60
"""A replica whose batch takes longer than this is replaced."""

logger = logging.getLogger("ray.serve")


class Replica:
    """One replica. Each batch is answered from one version, so no answer mixes two versions."""

    def __init__(self, config: Config, token_digest: str) -> None:
        service = config.service
        self._config, self._service, self._token_digest = config, service, token_digest
        self._answerer: Answerer | None = None
        self._previous: Answerer | None = None
        self._refusal: str | None = None
        self._recent: deque[Message] = deque(maxlen=service.max_batch_size)
        self._live = LiveUsers()
        self._log: ChangeLog | None = None
        self._batcher: Batcher[Message, Answer] = Batcher(
            self._compute, service.max_batch_size, service.max_batch_cost, service.max_wait_seconds, self._limit_threads
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self._service, self._token_digest, self)

    async def reconfigure(self, user_config: dict[str, str]) -> None:
        """Load `user_config["version"]` while the old version serves, then swap; if loading fails, the old version stays in service.

        The version before stays loaded, so that a rollback takes no time.
        """
        version = user_config["version"]
        self._refusal = None
        await self._follow()
        if self._answerer is not None and self._answerer.info.version == version:
            return
        try:
            is_loaded = self._previous is not None and self._previous.info.version == version
            loaded = self._previous if is_loaded else await asyncio.to_thread(self._load, version)
        except Exception as error:
            if self._answerer is None:
                raise
            self._refusal = " ".join(str(error).split())
            logger.exception("version %s cannot be served; %s keeps serving", version, self._answerer.info.version)
            return
        self._answerer, self._previous = loaded, self._answerer
        logger.info("serving version %s", version)

    async def ask(self, request: Message, deadline: float) -> Timed[Answer]:
        """Answer a request in the next batch.

        Raises:
            OverloadedError, DeadlineError: see `Batcher.ask`.
            RefusedError: no version is loaded yet.
        """
        if self._answerer is None:
            raise busy("no version is loaded yet")
        self._recent.append(request)
        return await self._batcher.ask(request, self._loaded.cost(request), deadline)

    async def record(self, changes: Sequence[Change]) -> list[bool]:
        """Append changes to the live log and return which are new.

        Raises:
            RefusedError: this service has no live log, or it cannot be reached.
        """
        if self._log is None:
            raise RefusedError(501, "this service records nothing (service.live = off)")
        try:
            return await self._log.append(changes)
        except UNREACHABLE as error:
            logger.warning("the live log cannot be reached: %s", error)
            raise busy("the log of events cannot be reached") from None

    @property
    def info(self) -> ModelInfo:
        """The served version; raises RuntimeError if none is loaded."""
        return self._loaded.info

    async def status(self) -> dict[str, str | None]:
        """Return the served version, and the reason if a newer one was refused."""
        return {"version": self.info.version, "refusal": self._refusal}

    async def check_health(self) -> None:
        """Raise if this replica cannot answer; Ray Serve then replaces it. Does not wait for a batch."""
        seconds = self._batcher.busy_seconds()
        if seconds > STUCK_SECONDS:
            raise RuntimeError(f"a batch has taken {seconds:.0f} s")

    async def _follow(self) -> None:
        """Open the live log and apply what it holds; later changes are applied in the background."""
        if self._log is None and self._service.live != "off":
            log = open_log(self._config)
            await Follower(log, self._live.apply).start()
            self._log = log

    def _load(self, version: str) -> "Answerer":
        from serve.answers.answering import Answerer

        return Answerer.load_checked(self._config, version, self._live, list(self._recent))

    def _compute(self, requests: Sequence[Message]) -> list[Answer]:
        """Answer a batch, in the thread of the batches."""
        return self._loaded.answer(requests)

    def _limit_threads(self) -> None:
        from serve.answers.answering import limit_threads

        limit_threads(self._service)

    @property
    def _loaded(self) -> "Answerer":
        if self._answerer is None:
            raise RuntimeError("no version is loaded")
        return self._answerer
