"""Finds the calls in an answer, whole or as it comes."""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Sequence
from typing import Protocol

from dovetail.tools import json_calls
from dovetail.tools.call import Call, CallPart, Part, TextPart, new_id
from dovetail.tools.formats import Format, Found
from dovetail.tools.frame import Frame
from dovetail.tools.request import Tools
from dovetail.tools.source import Read, Source


class Parser(Protocol):
    """Turns the text of one answer into parts. The parts do not depend on how the text is cut into pieces."""

    calls: int  # how many it has found
    broken: bool  # whether the answer has ended inside a call

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...


class PlainParser:
    """Reads an answer that has no calls: all of it is text."""

    calls = 0
    broken = False

    def push(self, text: str) -> list[Part]:
        return [TextPart(text)] if text else []

    def finish(self) -> list[Part]:
        return []


def parser_for(form: Format, tools: Tools, hidden: Collection[str] = ()) -> Parser:
    """A parser of one answer. hidden: marks that are control tokens, which are no text for the user."""
    if tools.required:
        return _FramedParser(form.frame)
    return _FreeParser(form, tools, hidden)


class _Base:
    """A parser runs as a generator, which stops where it needs more text."""

    def __init__(self, parallel: bool) -> None:
        self.calls = 0
        self.broken = False
        self._parallel = parallel
        self._source = Source()
        self._parts: list[Part] = []
        self._space = ""  # white space that is shown if text follows it
        self._text_begun = False  # since the last call
        self._shown = False  # whether there was any text
        self._running = self._run()

    def push(self, text: str) -> list[Part]:
        self._source.text += text
        return self._advance()

    def finish(self) -> list[Part]:
        self._source.closed = True
        parts = self._advance()
        if self._space and (self._text_begun or not self.calls):
            parts.append(TextPart(self._space))
        return parts

    def _run(self) -> Generator[None]:
        raise NotImplementedError

    def _advance(self) -> list[Part]:
        next(self._running, None)
        parts, self._parts = self._parts, []
        return parts

    def _text(self, text: str) -> None:
        """Show text. White space behind a call is dropped, and that before it unless text follows."""
        if self.calls and not self._text_begun:
            text = text.lstrip()
        if not text.strip():
            self._space += text
            return
        shown = (self._space + text).rstrip()
        self._space = text[len(text.rstrip()) :]
        self._text_begun = self._shown = True
        self._parts.append(TextPart(shown))

    def _begin_call(self, name: str) -> bool:
        """Show that a call begins, unless one call is all that is wanted."""
        if self.calls and not self._parallel:
            return False
        self._parts.append(CallPart(self.calls, id=new_id(), name=name))
        self.calls += 1
        self._space, self._text_begun = self._space * self._shown, False
        return True

    def _add_arguments(self, text: str) -> None:
        if text:
            self._parts.append(CallPart(self.calls - 1, text))


class _FreeParser(_Base):
    """Reads an answer that may contain calls. A call is shown when it is complete; what is none stays text."""

    def __init__(self, form: Format, tools: Tools, hidden: Collection[str]) -> None:
        self._readers = dict.fromkeys(hidden, ()) | dict(form.readers)
        self._hidden = frozenset(hidden)
        self._marks = frozenset(form.marks)
        self._known = {f.name: tuple(f.parameters.get("properties") or ()) for f in tools.callable}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._readers, key=len, reverse=True))))
        self._longest = max(map(len, self._readers))
        self._line = True  # whether a line begins here
        super().__init__(tools.parallel)

    def _run(self) -> Generator[None]:
        source, at = self._source, 0
        while True:
            start, begin = self._next(at)
            self._pass(source.text[at:start])
            source.text, at = source.text[start:], 0
            if begin:
                found = yield from self._read(begin)
                at = len(begin) if found is None else found[1]
                if found is not None:
                    self._show(found[0])
                elif begin not in self._hidden:
                    self._pass(begin)
            elif source.closed:
                return
            else:
                yield

    def _next(self, at: int) -> tuple[int, str]:
        """Where a call may begin and its first characters; or how far there is only text, and nothing."""
        text = self._source.text
        for found in self._pattern.finditer(text, at):
            start = found.start()
            if found.group() in self._marks or self._begins_line(text[at:start]):
                return start, "" if self._may_grow(text[start:]) else found.group()
        start = max(at, len(text) - self._longest + 1)
        while start < len(text) and not self._may_grow(text[start:]):
            start += 1
        return start, ""

    def _may_grow(self, end: str) -> bool:
        """Whether the end of the text may become the beginning of a call."""
        if self._source.closed or len(end) >= self._longest:
            return False
        return any(begin.startswith(end) and begin != end for begin in self._readers)

    def _begins_line(self, before: str) -> bool:
        if not before:
            return self._line
        return before.endswith("\n") or (self._line and not self._text_begun and before.isspace())

    def _pass(self, text: str) -> None:
        if text:
            self._line = self._begins_line(text)
            self._text(text)

    def _read(self, begin: str) -> Read[Found]:
        for reader in self._readers[begin]:
            found = yield from reader(self._source, 0, self._known)
            if found is not None:
                return found
        return None

    def _show(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if self._begin_call(call.name):
                self._add_arguments(call.arguments)
        self._line = True


class _FramedParser(_Base):
    """Reads an answer that a grammar holds to a frame. Arguments are shown as they come."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        super().__init__(parallel=True)

    def _run(self) -> Generator[None]:
        frame, source, start = self._frame, self._source, 0
        at = yield from self._expect(0, frame.opening + frame.head)
        while at is not None:
            end = yield from source.after_word(at, ".-")
            after = yield from self._expect(end, frame.middle)
            if end == at or after is None or not (yield from source.char(after)):
                break
            self._begin_call(source.text[at:end])
            stop = yield from self._arguments(after)
            at = None if stop is None else (yield from self._expect(stop, frame.tail))
            if at is None:
                self.broken = True
                return
            start = at
            at = yield from self._expect(start, frame.between + frame.head)
        if self.calls and (yield from source.starts(start, frame.closing)):
            start += len(frame.closing)
        while not source.closed:
            yield
        rest, head = source.text[start:], frame.between + frame.head
        cut = head.startswith(rest) or rest.startswith(head) or frame.closing.startswith(rest)
        if not (self.calls and cut):  # what is left of a further call is no text
            self._text(rest)

    def _expect(self, at: int, literal: str) -> Read[int | None]:
        return at + len(literal) if (yield from self._source.starts(at, literal)) else None

    def _arguments(self, at: int) -> Read[int | None]:
        shown = at

        def passed(reached: int) -> None:
            nonlocal shown
            self._add_arguments(self._source.text[shown:reached])
            shown = reached

        return (yield from json_calls.value_end(self._source, at, passed))
