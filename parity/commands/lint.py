"""`parity lint`: can this dump be trusted?"""

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


@o.fills("mapping")
def lint(
    given: o.Given,
    file: Annotated[Path, typer.Argument(help="A dump: your engine's, or llama.cpp's.", show_default=False)],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", help="GGUF file of the dump: needed to find late captures, wrong tokens and wrong shapes."
        ),
    ] = None,
    output_format: o.FormatOption = o.Format.TEXT,
) -> None:
    """Can this dump be trusted?

    Before your engine is blamed: does the dump show what the engine computed? Finds buffers captured too late or not copied,
    device memory read on the host, wrong types, duplicate or missing positions, truncated files. Exits 0 if clean, 1 with findings.
    """
    from checkpoints.formats import load
    from reports import lint as report

    from ..lint.lint import lint as check
    from ..lint.model_facts import open_model
    from ..run.graphs import dataflow_of
    from .output import answer, waiting

    with waiting(f"reading {file.name}", output_format):
        dump = load(file, given["mapping"])
        facts = open_model(model) if model is not None else None
        dataflow = None
        # Shared caches and operations that give zeros are innocent where it is known what points are made from.
        if facts is not None and not facts.alike and (dump.header is None or not dump.header.dataflow):
            dataflow = dataflow_of(facts.model.path)
        checked = check(dump, facts, dataflow)
    raise typer.Exit(answer(checked, report, output_format))
