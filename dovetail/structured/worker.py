"""The process in which grammars are tried first, where they can harm nobody.

It forks a child for each grammar. A child has a limited time and a limited memory, and the kernel ends it when it
takes more. So a grammar that takes for ever, takes all memory or overflows the stack ends alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import selectors
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from dovetail.core.structured import StructuredOutputs
from dovetail.structured.grammar import GrammarError, compiled, source
from dovetail.structured.vocabulary import Vocabulary

CPU_SECONDS = 1.0  # that a grammar may take, unless its job says less
WALL_SECONDS = 20.0  # the same by the clock, on a machine that does other things
MEMORY = 512 << 20  # bytes that a grammar may take

Job = dict[str, Any]


def tried(vocabulary: Vocabulary, job: Job) -> Job:
    """Compile one grammar. Returns its source, and what it took in bytes and seconds; or what is wrong with it."""
    before, started = _heap(), time.process_time()
    try:
        text = source(StructuredOutputs(**job["asked"]))
        parser = compiled(vocabulary, text)
    except GrammarError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"died": -signal.SIGABRT}
    except Exception as error:  # what llguidance says through Python
        return {"error": f"cannot be compiled: {str(error)[:300]}"}
    taken = {"bytes": max(0, _heap() - before) + len(text), "seconds": time.process_time() - started}
    del parser
    return {"source": text, **taken}


def _heap() -> int:
    """Bytes that are allocated."""
    info = _MALLINFO()
    return int(info.uordblks + info.hblkhd)


_COUNTS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Info(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in _COUNTS.split()]


def _peak() -> _Info:
    """Where the C library does not count: the most that was in use so far."""
    return _Info(uordblks=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _mallinfo() -> Callable[[], Any]:
    try:
        found = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return _peak
    found.restype = _Info
    return found


_MALLINFO = _mallinfo()


def limit(seconds: float = CPU_SECONDS) -> None:
    """Limit this process from now on, to some seconds of CPU among others.

    It has no standard streams: they are those of the process that forked it.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    for name in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(name, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


class Worker:
    """Reads a vocabulary and jobs from `jobs`, which has no buffer, until it ends. Writes results to `results`.

    Jobs and results are JSON objects, one a line.
    """

    def __init__(self, jobs: IO[bytes], results: IO[bytes]) -> None:
        self.vocabulary = Vocabulary.read(jobs)
        self._jobs = jobs
        self._begun = b""  # of a line
        self._results = results
        self._select = selectors.DefaultSelector()
        self._found: dict[int, bytes] = {}  # by the pipe of a running child: what it has said

    def run(self) -> None:
        self._select.register(self._jobs, selectors.EVENT_READ)
        while True:
            for key, _ in self._select.select():
                if key.fileobj is not self._jobs:
                    self._hear(key.fd, *key.data)
                elif said := self._jobs.read(1 << 20):
                    *lines, self._begun = (self._begun + said).split(b"\n")
                    for line in lines:
                        self._start(json.loads(line))
                else:
                    return

    def _start(self, job: Job) -> None:
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._compile(job, into)
        os.close(into)
        self._found[out] = b""
        self._select.register(out, selectors.EVENT_READ, (job["number"], pid))

    def _compile(self, job: Job, into: int) -> None:
        """What a child does."""
        try:
            limit(job["seconds"])
            with open(into, "wb") as file:
                file.write(json.dumps(tried(self.vocabulary, job)).encode())
        finally:
            os._exit(0)

    def _hear(self, pipe: int, number: int, pid: int) -> None:
        said = os.read(pipe, 1 << 16)
        self._found[pipe] += said
        if said:
            return
        self._select.unregister(pipe)
        os.close(pipe)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            result = json.loads(self._found.pop(pipe))
        except ValueError:
            result = {"died": code}
        self._results.write(json.dumps({"number": number, **result}).encode() + b"\n")
        self._results.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who ask
    os.nice(5)
    # Without a buffer, what select says about the pipe is true.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as jobs:
        worker = Worker(jobs, sys.stdout.buffer)
        gc.freeze()
        worker.run()


if __name__ == "__main__":
    main()
