"""Runs many rows at a time in one engine, and journals what is finished."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dovetail.batch.call import Call
from dovetail.batch.journal import Journal
from dovetail.batch.rows import Row
from dovetail.core.errors import RequestError
from dovetail.core.seams import Clock
from dovetail.llm import LLM
from dovetail.outputs import Answer
from dovetail.server import errors
from dovetail.server.intake import Intake

_LOG = logging.getLogger(__name__)
ANSWERS_PER_SEQUENCE = 4  # answers kept tokenized for each request that can run, so that the engine never waits


@dataclass
class Totals:
    """What a run did. An earlier run finished the `reused` rows. `seconds` are those of the session's clock."""

    clock: Clock
    rows: int = 0
    answered: int = 0
    errors: int = 0
    reused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unknown: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._started = self.clock.now()

    @property
    def seconds(self) -> float:
        return self.clock.now() - self._started


class Runner:
    """Runs rows on `llm`. `defaults` are sampling settings for rows that do not say."""

    def __init__(self, llm: LLM, journal: Journal, defaults: Mapping[str, Any]) -> None:
        self.llm = llm
        self.journal = journal
        self.defaults = defaults
        self.totals = Totals(llm.session.clock)
        self.keys: list[str] = []  # the key of every row, in the input's order
        self._intake = Intake(llm)
        self._calls: dict[Answer, Call] = {}  # the call of each running answer
        self._window = llm.config.max_num_seqs * ANSWERS_PER_SEQUENCE

    def run(self, rows: Iterable[Row], tick: Callable[[Runner], None]) -> None:
        """Finish every row; `tick` is called after each step. A bad row becomes an error result."""
        coming = iter(rows)
        more = True
        try:
            while more or self._calls:
                while more and len(self._calls) < self._window:
                    row = next(coming, None)
                    if row is None:
                        more = False
                    else:
                        self._start(row)
                for delta in self.llm.session.step():
                    if delta.last:
                        self._ended(delta.answer)
                tick(self)
        finally:
            for answer in self._calls:
                self.llm.session.abort(answer)

    @property
    def tokens(self) -> int:
        """Tokens written by this run, also for rows that are not finished."""
        return self.totals.completion_tokens + sum(call.tokens for call in set(self._calls.values()))

    def _start(self, row: Row) -> None:
        self.keys.append(row.key)
        self.totals.rows += 1
        if row.key in self.journal:
            self.totals.reused += 1
            return
        if row.error is not None:
            self._fail(row, row.error)
            return
        call = None
        try:
            call = Call(self._intake, row, self.defaults)
            for answer in call.answers:
                self.llm.session.submit(answer)
        except Exception as error:
            known = errors.request_error(error)
            if known.status >= 500:
                _LOG.exception("row %s failed", row.custom_id)
            for answer in () if call is None else call.answers:
                self.llm.session.abort(answer)
            self._fail(row, known)
            return
        self.totals.unknown.update(name[:64] for name in call.unknown[:64])
        self._calls.update(dict.fromkeys(call.answers, call))

    def _ended(self, answer: Answer) -> None:
        call = self._calls.pop(answer)
        call.open -= 1
        if not call.open:
            self._settle(call)

    def _settle(self, call: Call) -> None:
        if call.error is not None:
            self._fail(call.row, RequestError(call.error, status=500, type="server_error"))
            return
        body = call.body()
        self.totals.answered += 1
        self.totals.prompt_tokens += body["usage"]["prompt_tokens"]
        self.totals.completion_tokens += body["usage"]["completion_tokens"]
        self.journal.add(call.row.key, _record(call.row, 200, body, None))

    def _fail(self, row: Row, error: RequestError) -> None:
        self.totals.errors += 1
        body = errors.body(error)
        short = {"code": body["error"]["type"], "message": body["error"]["message"]}
        self.journal.add(row.key, _record(row, error.status, body, short))


def _record(row: Row, status: int, body: Mapping[str, Any], error: Mapping[str, Any] | None) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{row.key}", "body": body}
    return {"custom_id": row.custom_id, "response": response, "error": error}
