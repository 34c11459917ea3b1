"""How a load puts its requests."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Endpoint(enum.StrEnum):
    """Which of the API's two ways to generate text is asked."""

    COMPLETIONS = "completions"
    CHAT = "chat"


@dataclass(frozen=True)
class Asking:
    """How every request is put. `timeout` is seconds for a whole answer."""

    endpoint: Endpoint = Endpoint.COMPLETIONS
    ignore_eos: bool = True
    timeout: float = 600.0
    api_key: str | None = None
