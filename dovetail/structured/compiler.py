"""Has grammars tried by a process of their own, and says what came of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, TimeoutError
from dataclasses import fields
from pathlib import Path
from typing import Any

from dovetail.core.errors import RequestError
from dovetail.core.structured import StructuredOutputs
from dovetail.structured.grammar import GrammarError
from dovetail.structured.vocabulary import Vocabulary
from dovetail.structured.worker import CPU_SECONDS, MEMORY, WALL_SECONDS

AT_ONCE = 4  # grammars that are tried at the same time
QUICK = 0.1  # seconds of CPU; who takes more is tried again, when no other such grammar is
WAITING = 8  # of those who take more, before the next is sent away
_CODE = "from dovetail.structured.worker import main; main()"
_SIMPLER = "ask for something simpler"
_DEATHS = {
    0: "cannot be compiled",  # an error that Python does not foresee
    signal.SIGPROF: f"takes more than {CPU_SECONDS:g} seconds to compile; {_SIMPLER}",
    signal.SIGABRT: f"takes more than {MEMORY >> 20} MiB to compile; {_SIMPLER}",
    signal.SIGSEGV: f"is nested too deeply to compile; {_SIMPLER}",
}


class Compiler:
    """Tries grammars for one vocabulary. The process starts with the first one, and again after it was lost.

    Several threads may use it. A grammar waits for others only while AT_ONCE of them are being tried, for QUICK
    seconds each. Those that take longer wait for each other.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._room = threading.Semaphore(AT_ONCE)
        self._slow = threading.Semaphore(1)
        self._places = threading.Semaphore(WAITING)
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def try_out(self, asked: StructuredOutputs) -> Mapping[str, Any]:
        """Compile elsewhere. Returns its `source`, and the `bytes` and `seconds` that it took.

        GrammarError if it is wrong or takes too much. RequestError (503) if nobody can say.
        """
        given = {f.name: getattr(asked, f.name) for f in fields(asked) if f.init}
        given |= {"json": asked.text} if asked.form == "json" else {}
        with self._room:
            result = self._ask({"asked": given, "seconds": QUICK})
        if result.get("died") == -signal.SIGPROF:
            if not self._places.acquire(blocking=False):
                raise _unavailable(f"{WAITING} grammars that take long to compile are waiting")
            try:
                with self._slow:
                    result = self._ask({"asked": given, "seconds": CPU_SECONDS})
            finally:
                self._places.release()
        return _checked(result)

    def close(self) -> None:
        """End the process. The next grammar starts another."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.end()

    def _ask(self, job: Mapping[str, Any]) -> Mapping[str, Any]:
        for _ in range(2):  # the process may have been lost through no fault of this grammar
            process = self._running()
            result = None if process is None else process.ask(job)
            if result is not None:
                return result
        raise _unavailable("the process that compiles grammars cannot be kept running")

    def _running(self) -> _Process | None:
        """The process; None if it cannot be started."""
        with self._lock:
            if self._process is None or self._process.lost:
                if self._process is not None:
                    self._process.end()
                try:
                    self._process = _Process(self.vocabulary)
                except OSError:  # no memory, no descriptors, no processes
                    return None
            return self._process


class _Process:
    """The process, and the results that it owes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.lost = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        self.end: Callable[[], Any] = weakref.finalize(self, _end, self._process)
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # not `_lock`: a write may wait until results have been taken
        self._numbers = itertools.count()
        self._owed: dict[int, Future[Mapping[str, Any] | None]] = {}
        threading.Thread(target=listen, args=(self._process.stdout, weakref.ref(self)), daemon=True).start()
        self._send(vocabulary.write)

    def ask(self, job: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The result of a job; None if the process is lost."""
        future: Future[Mapping[str, Any] | None] = Future()
        with self._lock:
            number = next(self._numbers)
            self._owed[number] = future
        line = json.dumps({"number": number, **job}).encode() + b"\n"
        self._send(lambda pipe: pipe.write(line) and pipe.flush())
        try:
            return future.result(2 * WALL_SECONDS)
        except TimeoutError:
            self.end()
            return None

    def put(self, result: dict[str, Any]) -> None:
        with self._lock:
            future = self._owed.pop(result.pop("number"), None)
        if future is not None:  # else nobody waits any more
            future.set_result(result)

    def lose(self) -> None:
        """The process has ended, and what it owes will not come."""
        with self._lock:
            self.lost = True
            owed, self._owed = self._owed, {}
        for future in owed.values():
            future.set_result(None)

    def _send(self, write: Callable[[Any], Any]) -> None:
        try:
            with self._writing:
                write(self._process.stdin)
        except (BrokenPipeError, ValueError):  # the listener says that it is lost
            self.lose()


def listen(results: Any, process: Callable[[], _Process | None]) -> None:
    """Hand results, a line each, to the process that `process` gives while it is there, and say when they end."""
    with contextlib.suppress(ValueError):  # the last line is cut where the process was killed
        for line in results:
            if (owner := process()) is not None:
                owner.put(json.loads(line))
            del owner
    if (owner := process()) is not None:
        owner.lose()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not sent cannot be sent any more
                pipe.close()


def _checked(result: Mapping[str, Any]) -> Mapping[str, Any]:
    if "source" in result:
        return result
    if "error" in result:
        raise GrammarError(result["error"])
    if (why := _DEATHS.get(-result["died"])) is not None:
        raise GrammarError(why)
    raise _unavailable(f"the grammar could not be compiled now (signal {-result['died']})")


def _unavailable(why: str) -> RequestError:
    return RequestError(f"{why}; try again later", status=503, type="unavailable_error")
