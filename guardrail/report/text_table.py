"""A table as lines of text that fit a width. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from guardrail.report.formats import COLUMNS, shorten

GAP = 2  # spaces between columns
LEAST = 10  # fewest characters of a column that shrinks


def format_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
    indent: str = "",
    width: int = COLUMNS,
) -> list[str]:
    """Return the lines of a table: the heads, then one line per row.

    Args:
        right: numbers of the columns that are aligned to the right.
        width: of a line; the widest columns shrink until the table fits.
    """
    table = [tuple(heads), *(tuple(row) for row in rows)]
    widths = _measure_columns(table)
    _shrink_columns(widths, width - len(indent) - GAP * (len(widths) - 1))
    lines = []
    for row in table:
        cells = [
            _align_cell(shorten(cell, wide), wide, at in right)
            for at, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + (" " * GAP).join(cells)).rstrip())
    return lines


def measure_width(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Return how many characters the table needs to show every cell in full."""
    widths = _measure_columns([heads, *rows])
    return sum(widths) + GAP * (len(widths) - 1)


def _measure_columns(table: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def _align_cell(cell: str, width: int, right: bool) -> str:
    if right:
        return cell.rjust(width)
    return cell.ljust(width)


def _shrink_columns(widths: list[int], room: int) -> None:
    """Narrow the widest columns until all fit. Each keeps at least `LEAST` characters."""
    while sum(widths) > room and max(widths) > LEAST:
        widest = widths.index(max(widths))
        widths[widest] -= 1
