"""Plain tables for a terminal: columns aligned, numbers to the right."""

from __future__ import annotations

from collections.abc import Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """`rows` under `headers`, a line each. None is shown as -, floats with four significant digits; give text
    where another form is wanted. A column is aligned right if all of its cells are numbers.
    """
    numeric = [all(isinstance(r[c], (int, float)) or r[c] is None for r in rows) for c in range(len(headers))]
    lines = [list(headers), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(headers))]
    shown = []
    for line in lines:
        cells = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
