"""Shows on stderr how far a batch is: one line that is rewritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from dovetail.batch.runner import Runner
from dovetail.host.units import format_duration

TERMINAL_SECONDS = 0.2
PLAIN_SECONDS = 10.0
_WIDTH = 20


class Meter:
    """`meter(runner)` shows how far the runner is, if it is time to."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._terminal = sys.stderr.isatty()
        self._every = TERMINAL_SECONDS if self._terminal else PLAIN_SECONDS
        self._shown = time.monotonic()

    def __call__(self, runner: Runner) -> None:
        now = time.monotonic()
        if now - self._shown < self._every:
            return
        self._shown = now
        text = describe(runner, self.total)
        sys.stderr.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def describe(runner: Runner, total: int) -> str:
    """Rows, speed and the time left, in a line of fewer than 80 characters."""
    totals = runner.totals
    done = totals.answered + totals.errors + totals.reused
    filled = _WIDTH * done // max(1, total)
    parts = [f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {done}/{total} rows"]
    if totals.errors:
        parts.append(f"{totals.errors} errors")
    parts.append(f"{runner.tokens / max(totals.seconds, 1e-9):.0f} tokens/s")
    if totals.answered:  # rows that were not answered cost no time
        parts.append(f"{format_duration(totals.seconds / totals.answered * (total - done))} left")
    return ", ".join(parts)
