"""Answers of the service as bytes, and errors as problem documents (RFC 9457)."""

from http import HTTPStatus
from typing import NamedTuple

from pydantic import BaseModel

PROBLEM_TYPE = "application/problem+json"
MAX_DETAIL_CHARACTERS = 300
RETRY_SECONDS = 1


class Problem(BaseModel):
    """An error (RFC 9457); `detail` is one line for a person."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class Answer(NamedTuple):
    """An HTTP status and an encoded JSON body."""

    status: int
    body: bytes

    @classmethod
    def of(cls, response: BaseModel, status: int = 200) -> "Answer":
        """Encode a response."""
        return cls(status, response.model_dump_json().encode())

    @classmethod
    def problem(cls, status: int, detail: str) -> "Answer":
        """Encode an error; `detail` is one line for a person."""
        line = " ".join(detail.split())[:MAX_DETAIL_CHARACTERS]
        return cls(status, Problem(title=HTTPStatus(status).phrase, status=status, detail=line).model_dump_json().encode())


class RefusedError(Exception):
    """A request that is answered with an error: the HTTP status, one line for a person, and headers."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}

    @property
    def answer(self) -> Answer:
        """Return the refusal as a problem document."""
        return Answer.problem(self.status, self.detail)


def busy(detail: str, status: int = 503, seconds: float = RETRY_SECONDS) -> RefusedError:
    """Return the refusal of a request that may be sent again after some seconds."""
    wait = max(RETRY_SECONDS, round(seconds))
    return RefusedError(status, f"{detail}; try again in {wait} s", {"Retry-After": str(wait)})
