"""uvicorn with a shutdown that finishes open requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from dovetail.core.errors import ConfigError
from dovetail.server.app import create_app
from dovetail.server.connections import Acceptor, Connection, connection_limit
from dovetail.server.errors import Unavailable
from dovetail.server.guard import MAX_HEADER_BYTES
from dovetail.server.service import Service

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAST_SECONDS = 2.0  # time for the engine to end what is open
CUT_SECONDS = 0.7  # time for streams to say why they end, when the engine is not asked

_LOG = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Port 0 takes any free port. ConfigError if the address cannot be used."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # "localhost" may resolve to an IPv6 address first, which clients of 127.0.0.1 do not reach.
        family, kind, protocol, _, address = min(found, key=lambda f: f[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from None
    return listener


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HTTPServer(uvicorn.Server):
    """Serves a Service until told to stop.

    After the first SIGINT or SIGTERM, new work is refused and open requests may finish within the service's
    shutdown timeout. What is left then ends with an error. A second signal ends it at once, also with an error; a
    third waits for nothing. If the engine fails, open requests end with an error and `failed` is set.

    connections: how many there may be; None is what the process's open files allow.
    """

    def __init__(
        self,
        service: Service,
        on_ready: Callable[[], None] = lambda: None,
        connections: int | None = None,
    ) -> None:
        config = uvicorn.Config(
            create_app(service, self._engine_failed), http=Connection, ws="none", loop="asyncio", lifespan="on",
            log_config=None, access_log=False, server_header=False, h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        super().__init__(config)
        self.service = service
        self.on_ready = on_ready
        self.connections = connections
        self.failed = False
        self.interrupted = False
        self._ending: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Unlike in uvicorn, a handled signal is not raised again, so the process can exit with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.drain)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the service, and accept connections in a loop of our own."""
        await super().startup([])
        limit = self.connections or connection_limit()
        if limit < self.service.gate.limit:
            _LOG.warning(
                "open files allow %d connections, fewer than the %d answers that may run or wait; "
                "raise the limit (ulimit -n)", limit, self.service.gate.limit
            )  # fmt: skip

        def connection() -> Connection:
            made = Connection(self.config, self.server_state, self.lifespan.state)
            made.limit = limit
            return made

        state = self.server_state
        self.servers: list[Any] = [Acceptor(s, connection, state.connections, limit) for s in sockets or []]
        self.on_ready()

    def drain(self) -> None:
        """Stop: the first call lets open requests finish, the second ends them."""
        loop = asyncio.get_running_loop()
        if self._ending is None:
            self.service.gate.draining = True
            seconds = self.service.options.shutdown_timeout
            _LOG.info("shutting down: %d open requests, at most %g s", self.service.gate.requests, seconds)
            self._ending = loop.create_task(self._end_within(seconds))
        elif not self.interrupted:
            self.interrupted = True
            self._ending.cancel()
            self._ending = loop.create_task(self._end_now())
        else:
            self.should_exit = self.force_exit = True

    def _engine_failed(self) -> None:
        self.failed = True
        self.service.gate.draining = True
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end_within(LAST_SECONDS))

    async def _end_within(self, seconds: float) -> None:
        gate = self.service.gate
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(gate.idle(), seconds)
        if gate.requests:
            self.service.engine.abort_all(Unavailable("the server is shutting down"))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(gate.idle(), LAST_SECONDS)
        await self._cut()
        self.should_exit = True

    async def _end_now(self) -> None:
        await self._cut()
        self.should_exit = self.force_exit = True

    async def _cut(self) -> None:
        """End all that is open with an error, without the engine, which may be in a long step."""
        self.service.gate.cut()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.service.gate.idle(), CUT_SECONDS)


async def serve(server: HTTPServer, listener: socket.socket) -> int:
    """Run to the end. Returns the process's exit code."""
    await server.serve([listener])
    if server.failed or (server.service.engine.stuck and not server.interrupted):
        return 1
    return 130 if server.interrupted else 0
