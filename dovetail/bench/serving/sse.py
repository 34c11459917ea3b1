"""Server-sent events, as the HTML standard defines their parsing (section 9.2.6), from bytes as they come."""

from __future__ import annotations


class EventStream:
    """`feed` takes bytes, cut anywhere, and returns the data of the events that they complete."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[str] = []
        self._after_cr = False
        self._begun = False

    def feed(self, piece: bytes) -> list[str]:
        """Data of each event that ended in `piece`; lines of data are joined by newlines."""
        found: list[str] = []
        if not piece:
            return found
        ends_in_cr = piece.endswith(b"\r")
        if self._after_cr:
            piece = piece.removeprefix(b"\n")
        # bytes.splitlines splits at exactly the standard's three ends of a line.
        for line in piece.splitlines(keepends=True):
            self._line += line
            if line.endswith((b"\n", b"\r")):
                self._end_line(found)
        self._after_cr = ends_in_cr
        return found

    def close(self) -> list[str]:
        """The last event, if the stream ended without its blank line: some servers leave out the last one."""
        found: list[str] = []
        self._end_line(found)
        self._dispatch(found)
        return found

    def _end_line(self, found: list[str]) -> None:
        line = self._line.rstrip(b"\r\n").decode(errors="replace")
        self._line.clear()
        if not self._begun:
            line, self._begun = line.removeprefix("\ufeff"), True
        if not line:
            self._dispatch(found)
            return
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))

    def _dispatch(self, found: list[str]) -> None:
        if self._data:
            found.append("\n".join(self._data))
            self._data.clear()
