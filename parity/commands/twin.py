"""`parity twin`: an F32 copy of a model, or a copy of another type."""

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


@o.fills("verbose")
def twin(
    given: o.Given,
    model: Annotated[Path, typer.Argument(help="GGUF file.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    kind: Annotated[str, typer.Option("--type", help="F32, or another of llama.cpp's types: F16, Q8_0, Q4_K_M, …")] = "F32",
) -> None:
    """Write an F32 copy of a model with llama.cpp: exact mode runs it, and your engine should load it there."""
    from reference.client import Reference

    from .output import waiting, written

    with waiting(f"writing {out.name}"), Reference(verbose=given["verbose"]) as reference:
        reference.quantize(model, kind, out)
    written(out)
