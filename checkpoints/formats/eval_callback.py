"""What llama.cpp's eval-callback prints: a line that names a tensor, then some of its values to four decimals.

Three formats: `ggml_debug:` with the first three values of a row; with the first and last three and a sum; and
`common_debug_cb_eval:` with four blanks of indent a level. Other log lines may stand between.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import DumpError
from ..mapping import Mapping
from ..points import EMBD, in_layer, parse, resolve
from ..record import Dump, Rows

_HEAD = re.compile(
    rb"(?:ggml_debug|common_debug_cb_eval): +(.+?) = \((\w+)\) +(\S+)\((.*)\) = \{(\d{1,12}), (\d{1,12}), (\d{1,12}), (\d{1,12})\}"
)
_ROW = re.compile(rb"^\s*\[?\s*((?:-?(?:\d+\.\d+|nan(?:\(\w*\))?|inf)|\.\.\.|[,\s])+)\],?\s*$")
_PEEK = 1 << 20  # bytes that are looked at: such logs begin with the model's loading
_QUANTUM = 1e-4  # %.4f
_SHOWN = 3  # rows, and values of a row, from either end
_PROJECTIONS = {"Qcur": "q", "Kcur": "k", "Vcur": "v"}
_VIEWS = frozenset({b"RESHAPE", b"VIEW", b"PERMUTE", b"TRANSPOSE", b"CONT", b"CPY", b"SET_ROWS"})


@dataclass
class _Tensor:
    """A tensor that is being printed: rows of values, each a list in which None stands for what was left out."""

    point: str
    sizes: tuple[int, int, int, int]
    rows: list[tuple[int, list[float | None]]] = field(default_factory=list)
    at: int = 0  # number of the next row, counted over dimensions 1 and 2


def detect(path: Path) -> bool:
    """A text whose first MiB names a tensor in one of the three ways."""
    try:
        with path.open("rb") as file:
            return _HEAD.search(file.read(_PEEK)) is not None
    except OSError:
        return False


def read(path: Path, mapping: Mapping) -> Dump:
    """The printed values as scattered records, rounded to four decimals.

    Passes follow each other: each embedding begins one. A tensor with fewer rows than the pass has tokens holds its last ones.

    Raises:
        DumpError: the file cannot be read, or no tensor of it is known.
    """
    points: dict[str, dict[int, tuple[int, dict[int, float], int]]] = {}
    first = count = step = 0
    open_one: _Tensor | None = None

    def close() -> None:
        nonlocal open_one
        if open_one is not None and open_one.rows:
            _store(open_one, points, first, count, step)
        open_one = None

    try:
        with path.open("rb") as file:
            for line in file:
                head = _HEAD.search(line)
                if head is not None:
                    close()
                    sizes = (int(head[5]), int(head[6]), int(head[7]), int(head[8]))
                    point = _point(head[1], head[3], head[4], mapping)
                    if point == EMBD:
                        first, count, step = first + count, sizes[1], step + (count > 0)
                    if point is not None and min(sizes) > 0 and max(sizes) < 1 << 31:
                        open_one = _Tensor(point, sizes)
                elif open_one is not None:
                    if line.strip().startswith(b"sum ="):
                        close()
                    else:
                        _line(open_one, line)
        close()
    except OSError as error:
        raise DumpError(f"cannot read {path}: {error.strerror}.", "Check the path.", code="no-file") from error
    if not points:
        raise DumpError(f"{path} prints no tensor of a known name.", "Was it filtered?", code="no-records")
    made = {name: _rows(name, found) for name, found in points.items()}
    return Dump(str(path), None, made, notes=("values are printed to four decimals, some of each row",))


def _point(name: bytes, op: bytes, sources: bytes, mapping: Mapping) -> str | None:
    """Our point of a node; None for views and for what the vocabulary does not have."""
    text = name.decode("utf-8", "replace").strip()
    base, _, layer = text.rpartition("-")
    output = re.match(rb"blk\.(\d{1,6})\.attn_output\.weight", sources)
    if op == b"MUL_MAT" and output:
        return in_layer(int(output[1]), "attn_out")
    if op in _VIEWS:
        return None
    if base in _PROJECTIONS and layer.isdigit():
        return in_layer(int(layer), _PROJECTIONS[base] + ("_rope" if op == b"ROPE" else ""))
    if text == "norm":  # the final norm before its weight; the vocabulary's is result_norm
        return None
    point, entry = mapping.entry(resolve(text))
    known = parse(point).known
    if entry is None and (known is None or "t+1" in known.row):
        return None
    return point


def _line(tensor: _Tensor, line: bytes) -> None:
    """A row of values, or a mark that rows were left out."""
    text = line.strip()
    across, deep = tensor.sizes[1], tensor.sizes[2]
    if text.rstrip(b", ") in (b"...", b"[ ..."):  # of dimension 1 where its rows are open, else of dimension 2
        inside = tensor.at % across
        if inside == _SHOWN or (across > 2 * _SHOWN and inside):
            tensor.at += across - 2 * _SHOWN
        elif deep > 2 * _SHOWN:
            tensor.at += (deep - 2 * _SHOWN) * across
        return
    match = _ROW.match(line)
    if match is None or not re.search(rb"\d|nan|inf", match[1]):
        return
    values: list[float | None] = []
    for part in match[1].split(b","):
        word = part.strip()
        if word == b"...":
            values.append(None)
        elif word:
            try:
                values.append(float(word.split(b"(")[0]))
            except ValueError:
                return  # a line of another thread cut through it
    tensor.rows.append((tensor.at, values))
    tensor.at += 1


def _store(
    tensor: _Tensor, points: dict[str, dict[int, tuple[int, dict[int, float], int]]], first: int, count: int, step: int
) -> None:
    """The values of a tensor by position and element."""
    width, across, deep, _ = tensor.sizes
    heads = across if deep > 1 or tensor.point.endswith("_rope") else 1  # [d, H, T], else [n, T]
    total = deep if heads > 1 or tensor.point.endswith("_rope") else across
    at = points.setdefault(tensor.point, {})
    fresh: set[int] = set()
    for number, values in tensor.rows:
        token, head = divmod(number, across) if heads > 1 or tensor.point.endswith("_rope") else (number, 0)
        position = first + max(count, total) - total + token
        if token >= total:
            continue
        _, elements, _ = at.get(position, (step, {}, 0)) if position in fresh else (step, {}, 0)
        fresh.add(position)
        cut = values.index(None) if None in values else len(values)
        for i, value in enumerate(values):
            # What comes after the gap is counted from the row's end.
            index = i if i < cut else width - (len(values) - i)
            if value is not None and 0 <= index < width:
                elements[head * width + index] = value
        at[position] = (step, elements, heads * width)


def _rows(point: str, found: dict[int, tuple[int, dict[int, float], int]]) -> Rows:
    positions = sorted(found)
    counts = np.array([len(found[position][1]) for position in positions], dtype=np.int64)
    width = int(counts.max())
    values = np.full((len(positions), width), np.nan, dtype=np.float32)
    indices = np.full((len(positions), width), -1, dtype=np.int64)
    steps = np.array([found[position][0] for position in positions], dtype=np.int64)
    for r, position in enumerate(positions):
        elements = found[position][1]
        values[r, : len(elements)] = list(elements.values())
        indices[r, : len(elements)] = list(elements)
    return Rows(
        point=point,
        seq=np.zeros(len(positions), dtype=np.int64),
        token_idx=np.array(positions, dtype=np.int64),
        step=steps,
        decode=steps > 0,
        shapes=tuple((found[position][2],) for position in positions),
        values=values,
        counts=counts,
        indices=indices,
        quantum=np.where(indices >= 0, _QUANTUM, 0.0),
    )
