"""Logs of PyTorch's `DebugMode` with `log_tensor_hashes`: a line for each operation, with a hash of its result.

        aten::addmm(t: f32[8], t: f32[2, 4], t: f32[4, 8])  ->  t: f32[2, 8]  # {'hash': 6.691675990819931}
        aten::topk(t$3: f32[3, 4], 2)  ->  ('t$10: f32[3, 2]', 't$11: i64[3, 2]')  # {'hash': (7073038042398720, 0)}

A hash is the L1 norm of the whole tensor in float64, or, by `hash_fn="hash_tensor"`, a whole number of 64 bits that any changed bit
changes: its bits are compared. Neither is an activation, but two such logs can be compared to find the first operation at which they
differ. Each operation is a point, named by its module and its number among operations of its name there. The
log does not say what an operation reads: many lines are views of weights, and the line before is no input.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DumpError
from ..mapping import Mapping
from ..record import Dump, Header, Rows
from ..regular import read_text
from ..summary import summarise

_MODULE = re.compile(r"(\s*)\[nn\.Mod(?: \(compile\))?\] ([\w.\-]{1,300})")
_CALL = re.compile(
    r"(\s*)((?:aten|torch\.ops\.\w+|\w+)::[\w.]+)\(.*\)(?:\s+->\s+(?:\('?)?(?:t(?:\$\d+)?: (\w+)\[)?.*|\s+)"
    r"# \{.*'hash': (\([^)]*\)|\[[^\]]*\]|[-\w.+]+)"
)
_WHOLE = re.compile(r"\d{1,20}")
_COMPUTE = {"f32": "f32", "f16": "f16", "bf16": "bf16"}  # PyTorch's names of types -> a header's
_HEAD = 1 << 16
_LARGEST = 1 << 28  # bytes: 100 bytes for each of millions of operations
_MOST = 1 << 20  # operations: more would be a log of training
_BITS = np.arange(64, dtype=np.uint64)  # of `hash_tensor`
_HASHES = 64  # of one operation: no operation has more results


def detect(path: Path) -> bool:
    """A text with operations and their hashes."""
    if path.is_dir() or path.suffix in (".jsonl", ".pt", ".npy", ".npz", ".safetensors"):
        return False
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return b"::" in head and b"# {'" in head and b"'hash': " in head


def read(path: Path, mapping: Mapping) -> Dump:
    """One record for each operation, at position 0: the L1 norms of its results, or the bits of other hashes as 1 and −1.

    Raises:
        DumpError: it cannot be read, or no operation has a hash that is a number.
    """
    try:
        lines = read_text(path, _LARGEST).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DumpError(f"cannot read {path}: {' '.join(str(error).split())[:100]}.", "Write debug_string() again.") from error
    modules: list[tuple[int, str]] = []
    seen: dict[str, int] = {}
    points: dict[str, Rows] = {}
    compute = ""
    for line in lines:
        if (module := _MODULE.match(line)) is not None:
            depth = len(module[1])
            modules = [*(enclosing for enclosing in modules if enclosing[0] < depth), (depth, module[2])]
            continue
        call = _CALL.match(line)
        values = () if call is None else _numbers(call[4])
        if call is None or not len(values):
            continue
        if len(points) >= _MOST:
            break
        inside = next((name for depth, name in reversed(modules) if depth < len(call[1])), "")
        label = ".".join(filter(None, (inside, call[2].replace("::", "."))))
        seen[label] = seen.get(label, 0) + 1
        compute = compute or _COMPUTE.get(call[3] or "", "")
        name, _ = mapping.entry(f"{label}#{seen[label]}")
        with np.errstate(over="ignore"):
            row = np.array([values], np.float64).astype(np.float32)
        points[name] = summarise(name, row, np.zeros(1, np.int64), slice_size=None)
    if not points:
        raise DumpError(
            f"{path} has no operation with a hash that is a number.", "Use DebugMode.log_tensor_hashes().", code="no-records"
        )
    note = "values are hashes of whole tensors (L1 norms, or the bits of other hashes): compare with another such log"
    return Dump(str(path), Header("DebugMode", compute=compute, dataflow={}), points, notes=(note,))


def _numbers(text: str) -> Sequence[float]:
    """The norms among the hashes in a text; of hashes that are whole numbers the bits, as 1 and −1: a norm says how much differs."""
    words = [word for part in text.strip("()[]").split(",")[:_HASHES] if (word := part.strip())]
    whole = [int(word) for word in words if _WHOLE.fullmatch(word)]
    try:
        norms = [float(word) for word in words if not _WHOLE.fullmatch(word) and word != "None"]
    except ValueError:
        return ()
    if norms or max(whole, default=0) >= 1 << 64:
        return norms
    bits = np.array(whole, np.uint64)[:, None] >> _BITS & np.uint64(1)
    values: list[float] = (bits.astype(np.float64) * 2 - 1).ravel().tolist()
    return values
