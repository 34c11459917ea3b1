"""The servers that are measured. A server runs already, or is started for a model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from dovetail.bench.serving.client import Client, Served
from dovetail.bench.serving.request import Asking
from dovetail.bench.serving.server_process import ServerProcess, serving
from dovetail.core.errors import ConfigError
from dovetail.show.progress import note

_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/.*)?", re.ASCII)


@dataclass(frozen=True)
class Target:
    """A server under load. `process` is None if it ran already."""

    label: str
    client: Client
    served: Served
    options: tuple[str, ...] = ()
    process: ServerProcess | None = None

    @property
    def techniques(self) -> list[str]:
        """Names of the techniques that a server started here uses."""
        config = self.served.config if self.process is not None else None
        return [spec.partition(":")[0] for spec in (config or {}).get("use", ())]

    async def activity(self) -> dict[str, int]:
        """How often each technique of a server started here acted. ConfigError if it no longer says."""
        names = self.techniques
        return await self.client.activity(names) if names else {}

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.label,
            "url": self.client.url,
            "model": self.served.model,
            "context": self.served.context,
            "version": self.served.version,
            "config": self.served.config,
            "started_here": self.process is not None,
            "options": list(self.options),
        }


def server_url(name: str) -> str | None:
    """The address of a server, without /v1; None if `name` is a model. ConfigError for an impossible address."""
    if not name.startswith(("http://", "https://")):
        if _HOST_AND_PORT.fullmatch(name):
            raise ConfigError(f"{name}: the address of a server begins with http://, as in http://{name}")
        return None
    try:
        parts = urlsplit(name)
        valid = bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ConfigError(f"{name}: is not the address of a server; write it as http://127.0.0.1:8000")
    return name.rstrip("/").removesuffix("/v1").rstrip("/")


@dataclass(frozen=True)
class Opening:
    """How targets are reached: the model that requests ask for (None: the first that is served), how requests are
    sent, and the options of servers that are started.
    """

    model: str | None
    asking: Asking
    options: Sequence[str]


@contextlib.asynccontextmanager
async def opened(name: str, label: str, session: aiohttp.ClientSession, opening: Opening) -> AsyncIterator[Target]:
    """The target `name`, an address or a model. A server that is started for it ends with the block.

    Raises ConfigError.
    """
    url = server_url(name)
    if url is not None:
        client = Client(session, url, opening.asking)
        yield Target(label, client, await client.served(opening.model))
        return
    note(f"starting a server for {name}")
    async with serving(name, opening.options) as process:
        client = Client(session, process.url, opening.asking)
        yield Target(label, client, await client.served(None), tuple(opening.options), process)
