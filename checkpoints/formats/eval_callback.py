"""What llama.cpp's eval-callback prints: a line that names a tensor, then some of its values to four decimals.

Three formats: `ggml_debug:` with the first three values of a row; with the first and last three and a sum; and
`common_debug_cb_eval:`, indented by four spaces a level. `llama-debug` once printed a sum of squares beside the sum. Other
log lines may stand between.
"""

import re
from functools import partial
from pathlib import Path

from ..errors import DumpError
from ..mapping import Mapping
from ..points import EMBD, in_layer, parse, resolve
from ..record import Dump
from .printed_tensor import Printed, PrintedTensor, sums_of_all

_HEAD = re.compile(
    rb"(?:ggml_debug|common_debug_cb_eval): +(.+?) = \((\w+)\) +(\S+)\((.*)\) = \{(\d{1,12}), (\d{1,12}), (\d{1,12}), (\d{1,12})\}"
)
_WORD = re.compile(rb"-?(?:\d{1,60}\.\d{1,9}|nan(?:\(\w*\))?|inf)")
_SUM = re.compile(rb"^\s*sum\s+= (-?(?:\d{1,60}\.\d+|nan|inf))")
_LINE = 1 << 16  # bytes of a line that are searched at once …
_NAMED = 1000  # … and those that may name a tensor: a search in more could take quadratic time
_PEEK = 1 << 20  # bytes that are searched for a name: such logs begin with the loading of the model
_SHOWN = 3  # rows, and values of a row, from either end
_PROJECTIONS = {"Qcur": "q", "Kcur": "k", "Vcur": "v"}
_VIEWS = frozenset({b"RESHAPE", b"VIEW", b"PERMUTE", b"TRANSPOSE", b"CONT", b"CPY", b"SET_ROWS"})


def detect(path: Path) -> bool:
    """A text whose first MiB names a tensor in one of the three ways. A pipe is not opened: it can be read only once."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return any(_HEAD.search(line[:_NAMED]) for line in file.read(_PEEK).split(b"\n"))
    except OSError:
        return False


def read(path: Path, mapping: Mapping) -> Dump:
    """The printed values as scattered records, rounded to four decimals; a sum of all values goes into the pass's last record.

    Passes follow each other: each embedding begins one. A tensor with fewer rows than the pass has tokens holds its last rows.

    Raises:
        DumpError: the file cannot be read, or it has no known tensor.
    """
    points: dict[str, Printed] = {}
    verdicts: list[bool] = []
    first = count = step = 0
    open_one: PrintedTensor | None = None

    def close() -> None:
        nonlocal open_one
        if open_one is not None and open_one.rows:
            # A tensor with fewer rows than the pass has tokens holds its last rows.
            begin = first + max(count - open_one.tokens, 0)
            points.setdefault(open_one.point, Printed()).add(open_one, begin, step)
            more = open_one.sums_more()
            verdicts.extend([] if more is None or open_one.square else [more])
        open_one = None

    try:
        with path.open("rb") as file:
            for line in iter(partial(file.readline, _LINE), b""):
                head = _HEAD.search(line[:_NAMED])
                if head is not None:
                    close()
                    sizes = (int(head[5]), int(head[6]), int(head[7]), int(head[8]))
                    point = _point(head[1], head[3], head[4], mapping)
                    if point == EMBD:
                        first, count, step = first + count, sizes[1], step + (count > 0)
                    if point is not None and min(sizes) > 0 and max(sizes) < 1 << 31:
                        open_one = PrintedTensor(point, sizes)
                elif open_one is not None:
                    if (total := _SUM.match(line)) is not None:
                        open_one.total = float(total[1])
                        close()
                    else:
                        _line(open_one, line)
        close()
    except OSError as error:
        raise DumpError(f"cannot read {path}: {error.strerror}.", "Check the path.", code="no-file") from error
    recorded = {name: printed for name, printed in points.items() if printed.records}
    if not recorded:
        raise DumpError(f"{path} has no tensor with a known name.", "Check that the log was not filtered.", code="no-records")
    every = sums_of_all(verdicts)
    sums = "their sums are of all values" if every else "no sum covers more than these"
    rows = {name: printed.rows(name, sums=every) for name, printed in recorded.items()}
    return Dump(str(path), None, rows, notes=(f"values are printed to four decimals, a few of each row; {sums}",))


def _point(name: bytes, op: bytes, sources: bytes, mapping: Mapping) -> str | None:
    """Our point of a node; None for views and for nodes outside the vocabulary."""
    text = name.decode("utf-8", "replace").strip()
    base, _, layer = text.rpartition("-")
    output = re.match(rb"blk\.(\d{1,6})\.attn_output\.weight", sources)
    if op == b"MUL_MAT" and output:
        return in_layer(int(output[1]), "attn_out")
    if op in _VIEWS:
        return None
    if base in _PROJECTIONS and re.fullmatch(r"\d{1,6}", layer):
        return in_layer(int(layer), _PROJECTIONS[base] + ("_rope" if op == b"ROPE" else ""))
    if text == "norm":  # the final norm before its weight; the vocabulary's is result_norm
        return None
    point, entry = mapping.entry(resolve(text))
    known = parse(point).known
    if entry is None and (known is None or known.row[:1] == ("t+1",)):
        return None
    return point


def _line(tensor: PrintedTensor, line: bytes) -> None:
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
    if not text.startswith(b"[") or not text.rstrip(b", ").endswith(b"]"):
        return
    words = [word for part in text.rstrip(b", ")[1:-1].split(b",") if (word := part.strip())]
    if not words or not all(word == b"..." or _WORD.fullmatch(word) for word in words):
        return  # a line of another thread, or one that it interrupted
    values = [None if word == b"..." else float(word.split(b"(")[0]) for word in words]
    tensor.rows.append((tensor.at, values))
    tensor.at += 1
