"""`dovetail serve` in a process of its own, for as long as it is measured."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import dovetail
from dovetail.core.errors import ConfigError

END_SECONDS = 10.0  # time to end after SIGTERM, before it is killed
_READY = re.compile(r"Serving .* at (http://\S+)")
_LINE = 1 << 20  # bytes of the longest line that it may log


class ServerProcess:
    """A child that serves a model at `url`; `log` holds the last lines of its stderr."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""
        self.log: deque[str] = deque(maxlen=20)
        self._reader: asyncio.Task[None] | None = None

    async def ready(self, model: str) -> None:
        """Wait until it serves. If it ends before, ConfigError with the last line of its log."""
        async for line in self._lines():
            if found := _READY.search(line):
                self.url = found[1]
                self._reader = asyncio.create_task(self._drain())
                return
        await self.process.wait()
        words = self.last_words().removeprefix("dovetail: ")
        raise ConfigError(f"the server for {model} ended before it was ready: {words}")

    def last_words(self) -> str:
        """The last line that it logged."""
        return next((line for line in reversed(self.log) if line.strip()), "it said nothing")

    async def end(self) -> None:
        """SIGTERM, and SIGKILL if that does not help."""
        try:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), END_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            if self._reader is not None:
                self._reader.cancel()

    async def _lines(self) -> AsyncIterator[str]:
        assert self.process.stderr is not None
        while data := await self.process.stderr.readline():
            self.log.append(data.decode(errors="replace").rstrip())
            yield self.log[-1]

    async def _drain(self) -> None:
        async for _ in self._lines():
            pass


@contextlib.asynccontextmanager
async def serving(model: str, options: Sequence[str]) -> AsyncIterator[ServerProcess]:
    """A server for `model` on a free port, with these options of `dovetail serve`; it ends with the block."""
    # -P: nothing in the current folder is imported. The package may be an uninstalled checkout.
    root = str(Path(dovetail.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "dovetail", "serve", "--port", "0", *options, "--", model),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        limit=_LINE,
        start_new_session=True,  # this program acts on Ctrl-C, not the child
    )
    server = ServerProcess(process)
    try:
        await server.ready(model)
        yield server
    finally:
        await server.end()
