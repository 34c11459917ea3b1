"""Connections: how many there may be, who is let in when they are taken, and for how long a silent one stays."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dovetail.core.errors import RequestError
from dovetail.server import errors
from dovetail.server.errors import Unavailable

KEEP_ALIVE_SECONDS = 60  # for the next request of a connection to begin
HEADER_SECONDS = 20.0  # for the head of a request to arrive whole
FLUSH_SECONDS = 300.0  # for a client to read more of what waits for it
PAUSE_SECONDS = 0.2  # without accepting, when there is no descriptor left
GRACE_SECONDS = 1.0  # before a connection without a request may have to make room

BACKLOG = 2048
MAX_DESCRIPTORS = 1 << 16
RESERVE = 64  # descriptors for files, and for connections that are refused
REFUSED = 32  # connections beyond the limit that are told so; the next ones wait outside
MIN_CONNECTIONS = 8
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PROBES = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}

_LOG = logging.getLogger(__name__)


def raise_descriptor_limit() -> None:
    """Let this process open as many files as the system allows it, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connection_limit() -> int:
    """How many connections the descriptors that are left allow, with a reserve for other files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MAX_DESCRIPTORS)
    return max(MIN_CONNECTIONS, soft - _open_descriptors() - RESERVE)


def _open_descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # no such folder on this system
        return RESERVE


class Connection(H11Protocol):
    """uvicorn's protocol, with an end for clients that do not finish the head of a request, or do not read."""

    limit = MAX_DESCRIPTORS  # of connections; one beyond it is refused

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.timeout_keep_alive = KEEP_ALIVE_SECONDS
        self._serve, self._extra = self.app, False
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self.idle_since = 0.0

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _probe(transport.get_extra_info("socket"))
        if len(self.connections) > self.limit:
            self.app, self._extra = _refuse, True
        self.idle_since = self.loop.time()
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self._extra and len(self.connections) <= self.limit:  # others have left
            self.app, self._extra = self._serve, False
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.idle_since = self.loop.time()
        self._expect_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._deadline, self._unread):
            if timer is not None:
                timer.cancel()

    def _watch(self) -> None:
        """Set a deadline for the head of the next request. More bytes of it do not move the deadline."""
        if not self.idle:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
        elif self._deadline is None and self.timeout_keep_alive_task is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._deadline = None
        if self.idle and not self.transport.is_closing():
            if self.conn.trailing_data[0]:
                late = f"the head of the request did not arrive within {HEADER_SECONDS:g} seconds"
                self.transport.write(_whole(RequestError(late, status=408)))
            self.transport.close()

    def _expect_reading(self) -> None:
        """Look again later whether the client has read something. Closing would wait for it without end."""
        size = self.transport.get_write_buffer_size()
        if size and self._unread is None:
            self._unread = self.loop.call_later(FLUSH_SECONDS, self._abort_unread, size)

    def _abort_unread(self, size: int) -> None:
        self._unread = None
        if self.transport.get_write_buffer_size() == size:
            self.transport.abort()
        else:
            self._expect_reading()


def _probe(connection: Any) -> None:
    """Let the system find out when the other side's machine is gone."""
    with contextlib.suppress(OSError, AttributeError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    error = Unavailable("all connections of this server are taken")
    await errors.response(error, {"connection": "close"})(scope, receive, send)


def _whole(error: RequestError) -> bytes:
    """An answer as bytes, for a connection on which no request has begun."""
    answer = errors.response(error, {"connection": "close"})
    lines = [b"%s: %s" % header for header in answer.raw_headers]
    return b"\r\n".join([b"HTTP/1.1 %d Error" % answer.status_code, *lines, b"", bytes(answer.body)])


class Acceptor:
    """Accepts connections on a listener until it is closed.

    make: makes the protocol of each. connections: those that are open, which the protocols keep. limit: how many
    there may be.

    asyncio's own loop does not stop when there are no descriptors left: it logs and tries again at once, thousands
    of times. This one pauses. While all connections are taken, those that have been idle for longest make room. If
    none is idle, the next ones are told that there is no room. When many are being told, others wait outside.
    """

    def __init__(
        self, listener: socket.socket, make: Callable[[], Connection], connections: set[Any], limit: int
    ) -> None:
        self.limit = limit
        self._listener = listener
        self._make = make
        self._open = connections
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        self._task.cancel()
        asyncio.get_running_loop().remove_reader(self._listener)  # whose owner closes it at once

    async def wait_closed(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._listener)
            except ConnectionError:  # it has left again
                continue
            except OSError as error:
                _LOG.warning("no connection can be accepted: %s; %d are open", error.strerror, len(self._open))
                self._make_room(least=1)
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            if len(self._open) >= self.limit:
                self._make_room()
            try:
                await loop.connect_accepted_socket(self._make, accepted)
            except OSError:
                accepted.close()
            while len(self._open) >= self.limit + REFUSED:
                await asyncio.sleep(PAUSE_SECONDS)
                self._make_room()

    def _make_room(self, least: int = 0) -> None:
        """End those that have been idle for longest, `least` of them, and until there is room for one more.

        Those that have just come may be about to ask.
        """
        now = asyncio.get_running_loop().time()
        staying = [c for c in self._open if not c.transport.is_closing()]
        idle = [c for c in staying if c.idle and now - c.idle_since >= GRACE_SECONDS]
        count = max(least, len(staying) - self.limit + 1)
        for connection in sorted(idle, key=lambda c: c.idle_since)[:count]:
            connection.transport.close()
