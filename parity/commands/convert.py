"""`parity convert`: any dump as format 1."""

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


@o.fills("mapping")
def convert(
    given: o.Given,
    source: Annotated[
        Path,
        typer.Argument(
            help="JSON lines, an eval-callback log, a debugger's folder, .npy, .npz, .safetensors or .pt.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The dump to write.", show_default=False)],
) -> None:
    """Convert a dump in any known format to format 1: one JSON object per line, for `parity diff` and `parity lint`."""
    from checkpoints.formats import load
    from checkpoints.jsonl import write
    from checkpoints.record import Header

    from .output import notes, waiting, written

    with waiting(f"reading {source.name}"):
        dump = load(source, given["mapping"])
        write(dump, out, Header(source=f"converted from {source.name}"))
    notes(dump)
    written(out)
