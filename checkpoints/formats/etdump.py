"""ExecuTorch's ETDump, which is recognised and refused: an event says which operator ran, not where in the model.

Its schema (devtools/etdump/etdump_schema_flatcc.fbs) gives a DebugEvent an instruction's number and its operator's name (`aten::mm`); the
module that it belongs to is in the ETRecord of the exported program, which only ExecuTorch itself reads, and the values are in a debug
buffer beside it.
"""

import stat
from pathlib import Path
from typing import Never

from ..errors import DumpError
from ..mapping import Mapping

_IDENTIFIER = slice(4, 8)  # of a FlatBuffers file, after the offset of its root table
_ETDUMP = b"ED00"


def detect(path: Path) -> bool:
    """A FlatBuffers file with ETDump's identifier."""
    if not stat.S_ISREG(path.stat().st_mode):
        return False
    with path.open("rb") as file:
        return file.read(8)[_IDENTIFIER] == _ETDUMP


def read(path: Path, mapping: Mapping) -> Never:
    """Raises DumpError, always: it says what can be compared instead."""
    del mapping
    raise DumpError(
        f"{path} is ExecuTorch's ETDump, which names the operator of each instruction, not its place in the model.",
        "Open it with ExecuTorch's Inspector (ETRecord and debug buffer beside it), and save its tensors by point as .npz.",
        code="etdump",
    )
