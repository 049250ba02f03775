"""Puts the Python emitter together from the modules that define what it writes: there is no second definition."""

import ast
from pathlib import Path

import checkpoints

_MODULES = ("errors", "record", "points", "summary", "lines", "reading/words")  # each one needs only those before it

_RECORDER = ("cuda_driver", "graph_kernel", "graph_rows", "graphs", "head_rows", "injected", "recorder")  # beside this file

# Our data classes are msgspec's, which an engine's environment may lack: in the printed file they are the standard library's.
_STRUCTS = '''from dataclasses import asdict as as_dict, dataclass, field, replace


class Struct:
    """A base class that makes its subclasses dataclasses."""

    def __init_subclass__(cls, *, frozen: bool = False, **_: bool) -> None:
        dataclass(frozen=frozen)(cls)
'''

_TOP = '''"""Write checkpoints of a Python engine for `parity diff` and `parity lint`. One file; needs Python 3.10 and NumPy only.

    from parity_dump import Recorder

    with Recorder("ours.jsonl", compute="f32", model="my-model", tokens=ids) as tap:
        tap("embd", hidden)  # [T, n] or [n]: NumPy, CuPy, PyTorch, JAX, anything with DLPack
        tap("blk.5.l_out", hidden)  # copied in this call: reuse your buffers
        tap.hook(torch_model)  # or: record the submodules of a PyTorch model whose names are known

Printed by `parity emit python`, put together from parity's own source: don't edit, print it again.
"""

from __future__ import annotations

'''


_HF_TOP = '''"""Checkpoints of a Hugging Face model for `parity diff`. One file; needs Python 3.10, torch, transformers and NumPy.

    python parity_hf.py model.gguf --tokens 1,2,3 --out hf.jsonl
    parity diff hf.jsonl ref.jsonl

Printed by `parity emit hf`, put together from parity's own source: don't edit, print it again.
"""

from __future__ import annotations

'''


def hugging_face_file() -> str:
    """The text of parity_hf.py: the recorder, and the driver of a transformers model."""
    return _put_together(_HF_TOP, *_RECORDER, "hugging_face_names", "hugging_face")


def single_file() -> str:
    """The text of parity_dump.py."""
    return _put_together(_TOP, *_RECORDER)


def _put_together(top: str, *names: str) -> str:
    """One file made from the modules that define a dump and the named ones beside this file."""
    here = Path(__file__).parent
    folder = Path(checkpoints.__file__).parent
    imports: set[str] = set()
    files = [*(folder / f"{name}.py" for name in _MODULES), *(here / f"{name}.py" for name in names)]
    bodies = [_body(path.read_text(encoding="utf-8"), imports) for path in files]
    plain = sorted(line for line in imports if line.startswith("import "))
    named = sorted(line for line in imports if line.startswith("from "))
    return top + "\n".join((*plain, *named)) + "\n" + _STRUCTS + "\n\n" + "\n".join(bodies)


def _body(source: str, imports: set[str]) -> str:
    """A module without its docstring and imports; imports of other packages are added to `imports`."""
    tree = ast.parse(source)
    lines = source.splitlines()
    for number, node in enumerate(tree.body):
        docstring = number == 0 and isinstance(node, ast.Expr)
        if isinstance(node, ast.Import):
            imports.add(ast.unparse(node))
        elif (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and not (node.module or "").startswith(("checkpoints", "msgspec"))
        ):
            # Annotations are not evaluated, so that Self, which Python 3.10 lacks, is not needed.
            node.names = [name for name in node.names if name.name != "Self"]
            imports.add(ast.unparse(node))
        elif not docstring and not isinstance(node, ast.ImportFrom):
            continue
        for line in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[line] = ""
    return "\n".join(lines).strip("\n") + "\n\n"
