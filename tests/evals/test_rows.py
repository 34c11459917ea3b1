"""Files of rows: what is kept, what is refused, and with which line number."""

from __future__ import annotations

import pytest

from dovetail.core.errors import ConfigError, RequestError
from dovetail.evals.rows import given_file, left_out, read_jsonl, read_text

LINES = b'\xef\xbb\xbf{"n": 1}\r\n\n{broken\n[3]\n{"n": 4}\n{"n": "\\ud800"}\n{"n": NaN}\n \t\n{"n": 7}'


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)
    return path


def test_good_lines_are_kept_and_broken_ones_named_by_their_number(file):
    rows = read_jsonl(file)
    assert rows.rows == ((1, {"n": 1}), (5, {"n": 4}), (9, {"n": 7}))
    assert [r.line for r in rows.refused] == [3, 4, 6, 7]
    assert "not valid JSON" in rows.refused[0].why
    assert "must be a JSON object" in rows.refused[1].why
    text = left_out(rows.facts)
    assert text.startswith("\n4 left out: line 3: ") and text.endswith("; and 1 more")


def test_a_row_that_cannot_be_turned_is_refused_and_the_others_go_on(file):
    def even(row):
        if row["n"] % 2:
            raise RequestError("it is odd")
        return -row["n"]

    rows = read_jsonl(file).map(even)
    assert rows.rows == ((5, -4),)
    assert [(r.line, r.why) for r in rows.refused if "odd" in r.why] == [(1, "it is odd"), (9, "it is odd")]
    assert [r.line for r in rows.refused] == sorted(r.line for r in rows.refused)
    with pytest.raises(RequestError, match=r"no row that can be used: line 1: .*; and 4 more"):
        rows.map(lambda n: even({"n": 1}))


def test_other_errors_are_not_rows_that_are_refused(file):
    with pytest.raises(ZeroDivisionError):
        read_jsonl(file).map(lambda row: 1 / 0)


def test_the_first_rows_know_nothing_of_what_comes_after(file):
    rows = read_jsonl(file)
    assert rows.first(None) == rows.first(3) == rows.first(99) == rows
    assert [line for line, _ in rows.first(2).rows] == [1, 5]
    assert [r.line for r in rows.first(2).refused] == [3, 4]
    assert rows.first(1).refused == ()


def test_examples_are_taken_from_the_start(file):
    rows = read_jsonl(file)
    examples, rest = rows.split(2)
    assert examples == [{"n": 1}, {"n": 4}] and rest.values == [{"n": 7}]
    assert rows.split(0) == ([], rows)
    with pytest.raises(ConfigError, match=r"--shots 3: .* has 3 usable rows"):
        rows.split(3)


def test_values_are_paired_in_order(file):
    assert [pair for _, pair in read_jsonl(file).zip("abc").rows] == [
        ({"n": 1}, "a"),
        ({"n": 4}, "b"),
        ({"n": 7}, "c"),
    ]
    with pytest.raises(ValueError, match="longer"):
        read_jsonl(file).zip("abcd")


def test_text_has_a_value_in_each_line(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("  größer \n\n".encode() + b"\xff\n{}\n")
    rows = read_text(path)
    assert rows.rows == ((1, "größer"), (4, "{}"))
    assert [(r.line, r.why) for r in rows.refused] == [(3, "the line is not UTF-8: invalid start byte")]


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(RequestError, match="it is empty"):
        read_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="No such file"):
        read_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_text(tmp_path)
    for data, words in ((None, "nothing was given"), (tmp_path, "is none"), (tmp_path / "missing", "is none")):
        with pytest.raises(ConfigError, match=f"jsonl needs a file of rows as --data FILE.jsonl; .*{words}"):
            given_file("jsonl", data)
    assert given_file("jsonl", tmp_path / "empty.jsonl") == tmp_path / "empty.jsonl"
