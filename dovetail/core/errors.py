"""The types of errors. Every message says what was asked, what was found and what to change."""

from __future__ import annotations


class DovetailError(Exception):
    """Base of every error that Dovetail raises on purpose."""


class ModelError(DovetailError):
    """A checkpoint that cannot be read, is corrupt, or contradicts itself."""


class ConfigError(DovetailError):
    """An option with an impossible value, or a combination that is refused."""


class CapacityError(DovetailError):
    """Something that can never fit; the message carries the numbers."""


class ForkError(DovetailError):
    """An engine used in a forked child of the process that made it; its threads stayed behind."""


class RequestError(DovetailError):
    """A request that cannot be served.

    `status`, `type` and `param` are what an OpenAI-compatible server answers with.
    """

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, type: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.type = type
