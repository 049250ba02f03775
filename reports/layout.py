"""Columns and labelled sentences as lines of text, without trailing spaces, so that piped output is clean."""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

_GAP = 2
_NARROWEST = 12  # columns below which nothing is broken, but cut


def columns(rows: Sequence[Sequence[str]], right: frozenset[int], styles: Sequence[str], width: int) -> list[Text]:
    """Aligned rows of cells; the columns in `right` are aligned to the right. The last column is broken at spaces if it does not fit."""
    widths = [max(cell_len(row[number]) for row in rows) for number in range(len(rows[0]))]
    room = max(width - sum(widths[:-1]) - _GAP * (len(widths) - 1), _NARROWEST)
    lines: list[Text] = []
    for row, style in zip(rows, styles, strict=True):
        cells = row[:-1]
        for part in wrap(row[-1], room):
            line = ""
            for number, (cell, size) in enumerate(zip((*cells, part), widths, strict=True)):
                pad = " " * (size - cell_len(cell))
                line += (pad + cell if number in right else cell + pad) + " " * _GAP
            lines.append(Text(cut(line.rstrip(), width), style=style))
            cells = ("",) * len(cells)
    return lines


def needed(rows: Sequence[Sequence[str]]) -> int:
    """How many terminal columns these rows take."""
    widths = [max(cell_len(row[number]) for row in rows) for number in range(len(rows[0]))]
    return max(sum(widths[:-1]) + _GAP * (len(widths) - 1) + cell_len(row[-1]) for row in rows)


def cut(text: str, width: int) -> str:
    """The text, or as much of it as fits in front of an ellipsis."""
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)).rstrip() + "…"


def labelled(rows: Sequence[tuple[str, str]], width: int, *, label: int = 0, indent: int = 0) -> list[Text]:
    """Names in front of sentences, which wrap beside them; a name that repeats is printed once."""
    label = max([label, *(cell_len(name) + _GAP for name, _ in rows)])
    lines: list[Text] = []
    before = ""
    for name, sentence in rows:
        room = max(width - indent - label, 20)
        for number, part in enumerate(wrap(sentence, room)):
            shown = name if number == 0 and name != before else ""
            line = Text(" " * indent).append(shown.ljust(label), style="dim").append(part)
            lines.append(line)
        before = name
    return lines


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces; a longer word stays whole, so that it can be copied."""
    lines: list[str] = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and cell_len(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
