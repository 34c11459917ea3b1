"""Progress on stderr: a bar on a terminal, one line elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from dovetail.host.units import format_size

Advance = Callable[[int], None]


def note(text: str) -> None:
    """One line for the person watching; never a result."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def transfer(what: str, total: int) -> Iterator[Advance]:
    """Show `what` moving towards `total` bytes; the yielded function takes the bytes done so far."""
    if not sys.stderr.isatty():
        note(f"{what} ({format_size(total)})")
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=min(done, total))
        progress.update(task, completed=total)


@contextlib.contextmanager
def counter(what: str, total: int, enabled: bool = True) -> Iterator[Advance]:
    """Show `what` counted towards `total` on a terminal; the yielded function takes how many more are done."""
    if not (enabled and total > 1 and sys.stderr.isatty()):
        yield lambda more: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda more: progress.advance(task, more)
