"""A candidate in a process of its own, which does one thing at a time: settings are timed in turns, and one that
fails or needs too much memory does not end the others.

The processes speak in lines of JSON: {"do": NAME, ...} one way, a result or {"error": TEXT} the other way.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import ConfigError, DovetailError, RequestError
from dovetail.host.interrupts import uninterrupted
from dovetail.options import Options

if TYPE_CHECKING:
    from dovetail.advise.candidates import Candidate
    from dovetail.bench.engine.limited import Batch
    from dovetail.llm import LLM

# -P and the path of this process make the child import what this process would, in any folder.
_CHILD = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from dovetail.advise.worker import main; main()"
WINDOW = 512  # tokens of text that are scored together
_LAST_WORDS = 10  # lines of a process that failed


class Failed(DovetailError):
    """What a worker was asked cannot be done, and why."""


class Worker:
    """The parent's side of a candidate's process. Failed where the model cannot be loaded. Must be closed."""

    def __init__(self, candidate: Candidate) -> None:
        setting = candidate.setting
        asked = {"model": candidate.model, "use": setting.use, "options": vars(setting.options)}
        command = [sys.executable, "-P", "-c", _CHILD, json.dumps(sys.path), json.dumps(asked)]
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        pipe = subprocess.PIPE
        with uninterrupted():  # after an interrupt in between, nobody would know the new process
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, start_new_session=True
            )
        try:
            self.loaded = self._answer()
        except BaseException:
            self.close()
            raise

    def loss(self, corpus: str, data: Path | None, windows: int) -> dict[str, Any]:
        """The perplexity of the first `windows` windows of a corpus: the suite's figures."""
        return self._ask("loss", corpus=corpus, data=None if data is None else str(data), windows=windows)

    def prompt(self, tokens: int) -> float:
        """Read one prompt; tokens per second."""
        return float(self._ask("prompt", tokens=tokens)["rate"])

    def fill(self, context: int, streams: int) -> None:
        """Read so many prompts of `context` tokens, so that `decode` can go on behind them."""
        self._ask("fill", context=context, streams=streams)

    def decode(self, steps: int) -> dict[str, Any]:
        """Time steps of what was filled: `rate` in tokens per second, `batch` requests, the `bytes` of a step and
        the `memory_share`, that of a step's time in which they could just be read (None where they are not
        known)."""
        return self._ask("decode", steps=steps)

    def drain(self) -> dict[str, Any]:
        """Give up what was filled. Returns `memory`, the most bytes that the process held, and `activity`."""
        return self._ask("drain")

    def run(self, requests: Sequence[tuple[int, int]], concurrency: int) -> float:
        """Answer requests of so many tokens, `concurrency` at once. Seconds."""
        return float(self._ask("run", requests=requests, concurrency=concurrency)["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()

    def _ask(self, do: str, **values: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; its answer says why
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            last = "\n".join(self._errors.read().splitlines()[-_LAST_WORDS:])
            raise Failed(f"its process ended with {status}{': ' if last else ''}{last}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Failed(str(found["error"]))
        return found


class Engine:
    """The child's side: what it is asked are its public methods, in the order of `Worker`'s."""

    def __init__(self, asked: dict[str, Any]) -> None:
        from dovetail.bench.engine import roofline
        from dovetail.bench.engine.points import Prompts
        from dovetail.llm import LLM

        self.llm: LLM = LLM(asked["model"], use=asked["use"], **vars(Options(**asked["options"])))
        self.llm.keep_packed()
        self._prompts = Prompts(self.llm.session.vocab_size)
        self._why = roofline.uncounted(self.llm)
        self._batch: Batch | None = None
        self._context = 0

    @property
    def facts(self) -> dict[str, Any]:
        config = self.llm.config
        return {
            "vocabulary": self.llm.session.vocab_size,
            "context": config.max_model_len,
            "uncounted": self._why,
            "config": config.to_dict() | {"use": list(config.use)},
        }

    def loss(self, corpus: str, data: str | None, windows: int) -> dict[str, Any]:
        from dovetail.evals.perplexity import Perplexity

        window = min(WINDOW, self.llm.config.max_model_len)
        suite = Perplexity(corpus, None if data is None else Path(data), window=window, windows=windows)
        return suite.measure(self.llm, None)

    def prompt(self, tokens: int) -> dict[str, Any]:
        from dovetail.bench.engine.points import measure

        return {"rate": tokens / measure(self.llm, self._prompts.take(tokens), 1).first}

    def fill(self, context: int, streams: int) -> dict[str, Any]:
        from dovetail.bench.engine.limited import Batch

        self.drain()
        room = self.llm.config.max_model_len - context
        self._batch = Batch(self.llm, self._prompts.take(context, streams), room)
        self._context = context
        self._batch.settle()
        return {}

    def decode(self, steps: int) -> dict[str, Any]:
        from dovetail.bench.engine import roofline
        from dovetail.bench.interleave import read_bandwidth

        assert self._batch is not None
        found = self._batch.decode(steps)
        known: dict[str, Any] = {"bytes": None, "memory_share": None}
        if self._why is None:
            at = self._context, found.batch
            bandwidth = read_bandwidth(self.llm.config.threads) * 1e9
            least = roofline.step_seconds(self.llm, at[0], bandwidth, at[1])
            known = {
                "bytes": roofline.step_bytes(self.llm, *at),
                "memory_share": min(1.0, least * found.rate / found.batch),
            }
        return {"rate": found.rate, "batch": found.batch, **known}

    def drain(self) -> dict[str, Any]:
        from dovetail.host.process import peak_rss

        if self._batch is not None:
            self._batch.close()
            self._batch = None
        return {"memory": peak_rss(), "activity": self.llm.activity()}

    def run(self, requests: Sequence[tuple[int, int]], concurrency: int) -> dict[str, Any]:
        from dovetail.core.sampling import SamplingParams

        session = self.llm.session
        waiting = [
            session.prepare(
                self._prompts.take(prompt)[0], SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
            )
            for prompt, output in reversed(requests)
        ]
        start, running = time.perf_counter(), 0
        while waiting or session.busy:
            while waiting and running < concurrency:
                session.submit(waiting.pop())
                running += 1
            ended = [delta.answer for delta in session.step() if delta.last]
            running -= len(ended)
            if failed := next((answer.error for answer in ended if answer.error is not None), None):
                raise RequestError(f"a request of the workload failed: {failed}")
        return {"seconds": time.perf_counter() - start}


def main() -> None:
    """What the child does: load, then answer lines until there are no more."""
    out, sys.stdout = sys.stdout, sys.stderr  # only answers go to the parent

    def answer(act: Callable[[], dict[str, Any]]) -> None:
        try:
            found = act()
        except (DovetailError, ConfigError, MemoryError) as error:
            found = {"error": str(error) or type(error).__name__}
        out.write(json.dumps(found) + "\n")
        out.flush()

    engine: Engine | None = None

    def load() -> dict[str, Any]:
        nonlocal engine
        engine = Engine(json.loads(sys.argv[2]))
        return engine.facts

    answer(load)
    for line in sys.stdin:
        if engine is None:
            return
        asked = json.loads(line)
        act = getattr(engine, asked.pop("do"))
        answer(lambda act=act, asked=asked: act(**asked))  # type: ignore[misc]
