from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dovetail.bench.serving.sse import EventStream

LINES = st.lists(
    st.sampled_from(
        [
            *("", "", "data: a", "data:b", "data:  two", "data", "data: é\u2028ü", ": comment", ":", "event: x"),
            *("id: 1", "retry: 3", "nonsense", "data: [DONE]", 'data: {"a": 1}', "dat: no", " data: no"),
        ]
    ),
    max_size=20,
)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def feed(pieces: list[bytes]) -> list[str]:
    events = EventStream()
    found = [data for piece in pieces for data in events.feed(piece)]
    return found + events.close()


def expected(lines: list[str]) -> list[str]:
    """The standard's rules on whole lines, said the slow way."""
    found, data = [], []
    for line in [*lines, ""]:
        if line == "":
            found += ["\n".join(data)] if data else []
            data = []
        elif line == "data" or line.startswith("data:"):
            value = line[5:]
            data.append(value[1:] if value.startswith(" ") else value)
    return found


@st.composite
def cut_streams(draw) -> list[bytes]:
    """Lines with any ends, as bytes cut anywhere."""
    stream = "".join(line + draw(ENDS) for line in draw(LINES)).encode()
    places = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    bounds = [0, *places, len(stream)]
    return [stream[a:b] for a, b in pairwise(bounds)]


@given(cut_streams())
def test_events_do_not_depend_on_where_the_stream_is_cut(pieces) -> None:
    whole = b"".join(pieces)
    assert feed(pieces) == feed([whole]) == feed([whole[i : i + 1] for i in range(len(whole))])


@given(LINES, ENDS, st.integers(1, 7))
def test_events_are_those_of_the_standard(lines, end, size) -> None:
    stream = "".join(line + end for line in lines).encode()
    assert feed([stream[i : i + size] for i in range(0, len(stream), size)]) == expected(lines)


@given(st.lists(st.binary(max_size=12), max_size=12))
def test_no_bytes_break_it(pieces) -> None:
    assert feed(pieces) == feed([b"".join(pieces)])


def test_an_event_is_given_as_soon_as_its_blank_line_is_there() -> None:
    events = EventStream()
    assert events.feed(b"\xef\xbb\xbfdata: one\r\n") == []
    assert events.feed(b"\r") == ["one"]
    assert events.feed(b"\ndata: two\n\n") == ["two"]


def test_the_last_event_needs_no_blank_line() -> None:
    events = EventStream()
    assert events.feed(b"data: [DONE]") == []
    assert events.close() == ["[DONE]"]
