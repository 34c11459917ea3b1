"""The `dovetail` program in this process, in one of its own, and on a terminal of its own."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from typer.testing import CliRunner

from dovetail import cli

_MAIN = "import sys; from dovetail.cli import main; sys.argv[0] = 'dovetail'; main()"
SMALL = ("--kv-memory", "4MiB", "--threads", "1")


def call(*arguments: object, stdin: str | bytes | None = None) -> Any:
    """Run a command in this process; a result with exit_code, stdout and stderr."""
    words = [str(a) for a in arguments]
    return CliRunner().invoke(cli.build([words[0]]), words, input=stdin, catch_exceptions=False)


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """Run a command in a process of its own."""
    return subprocess.Popen(argv(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE)


def argv(arguments: Sequence[object]) -> list[str]:
    return [sys.executable, "-c", _MAIN, *map(str, arguments)]


class Terminal:
    """A command on a pseudo-terminal: what is typed, and what is seen."""

    def __init__(self, *arguments: object) -> None:
        command = argv(arguments)
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, {**os.environ, "TERM": "dumb"})
        self.seen = ""
        self.status: int | None = None

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60.0) -> str:
        """Read until `pattern` is seen, and return what came up to there."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.seen, re.DOTALL)) is None:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self.fd, 65536) if ready else b""
            if not data:
                raise AssertionError(f"{pattern!r} did not appear; last seen: {self.seen[-500:]!r}")
            self.seen += data.decode("utf-8", "replace")
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before

    def press(self, key: str, pattern: str) -> str:
        """Type `key` until `pattern` is seen.

        A signal that comes just before CPython's readline begins to wait is only noticed with the next input,
        so a person would press again; so does this, after five seconds of silence.
        """
        for _ in range(5):
            self.type(key)
            try:
                return self.wait_for(pattern, seconds=5)
            except AssertionError as error:
                last = error
        raise last

    def end(self, key: str = "") -> int:
        """The exit code, once the program has left; `key` is typed until it does."""
        for _ in range(12):
            with contextlib.suppress(OSError):  # Linux says EIO when the other side is closed
                self.type(key)
                while select.select([self.fd], [], [], 5)[0]:
                    if not os.read(self.fd, 65536):
                        break
                else:
                    continue
            break
        else:
            raise AssertionError(f"the program does not end; last seen: {self.seen[-500:]!r}")
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *reason: object) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)
