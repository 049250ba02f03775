"""`parity conform`: an engine on tiny models of every architecture and type."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o


class ConformSide(StrEnum):
    """What may be tested against llama.cpp."""

    OURS = "ours"
    HF = "hf"
    SERVER = "server"


@o.fills("tested_command", "hugging_face", "asking", "compute", "tolerance", "threads", "backend", "mapping", "verbose")
def conform(
    given: o.Given,
    context: typer.Context,
    side: Annotated[
        ConformSide | None,
        typer.Option(
            "--side",
            help="Instead of --exec: the engine that comes with parity (ours), or Hugging Face (hf, in --python). With --exec: server, "
            "for a command that starts a completion server of {model} on {port}.",
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option("--profile", help="The matrix: llama, quants, dense, moe, recurrent or all.")
    ] = "llama",
    architectures: Annotated[
        str | None,
        typer.Option(
            "--architectures",
            help="Architectures instead of the profile's: names and globs, separated by commas: 'qwen*,gemma3'.",
        ),
    ] = None,
    types: Annotated[str | None, typer.Option("--types", help="Weight types instead of the profile's: 'F32,Q*_K'.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="Prompts: short (6 tokens), long (37, beyond attention windows), one (a single token), same (one token nine times).",
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            help="Modes: prefill; decode, chunked ({portions} in --exec); batch ({sequences}); state ({state}). "
            "Default: all that the command line of the engine supports.",
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain/--no-explain", help="Look for the causes of failures.")] = True,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, max=256, help="Processes, each with its own llama.cpp; default: what the machine has room for."
        ),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Run on a Dask cluster instead: tcp://host:8786 (pip install '.[cluster]').")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the run; default: runs/conform-<engine>. Finished cells are kept there."),
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write JUnit XML: one case per cell.")] = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", help="Write every cell's figures, updated while cells end: FILE.csv or FILE.parquet."),
    ] = None,
    output_format: o.AnswerOption = o.AnswerFormat.TEXT,
) -> None:
    """Test an engine on tiny seeded models of every architecture and weight type: a verdict for each, one line for each cause.

    {model} is the model file itself, in the type under test; an engine may refuse it (a nonzero exit code and a sentence on
    stderr), which is not a failure. With {points} the engine is asked for every operation, so that the failing one can be named.

      parity conform --exec "./engine {model} {tokens} {out} {points}"

      parity conform --exec "./e {model} {sequences} {out} {portions} {state}"

      parity conform --side server --exec "./server -m {model} --port {port}"

      parity conform --side ours --architectures 'qwen*' --types F32,Q4_K

    Run it again after a fix: only what changed is computed again. Exits 0 if nothing is wrong, 1 if a cell diverges, crashes
    or takes too long.
    """
    from ..conform import served
    from ..conform.bench import Settings
    from ..conform.conform import ConformRequest
    from ..conform.conform import conform as run
    from ..conform.matrix import cells, modes_of
    from ..conform.table import GrowingTable
    from ..run.hugging_face import HuggingFace
    from ..run.request import Request
    from ..run.sides import OurEngine
    from ..run.workers import fitting
    from .conform_output import Shown, check_outputs, check_side, show

    command = given["command"]
    server = side is ConformSide.SERVER
    asking = served.Asking(given.pop("server_api"), given.pop("server_json"))
    check_side(command, None if side is None else side.value, asking)
    check_outputs(junit, table)
    if side is not ConformSide.HF:
        o.refuse_unused(context, "python hf_device", "is for Hugging Face", "Add --side hf.")
    if side is not ConformSide.OURS:
        o.refuse_unused(context, "backend", "is for the engine that comes with parity", "Add --side ours.")
    if command is None:
        o.refuse_unused(context, "names offset", "is for an engine of yours", "Give its command with --exec.")
    hf_engine = HuggingFace(Path(), given.pop("python"), given.pop("device"), slice_size=None)
    if side is ConformSide.HF:
        hf_engine.check()
    ways = OurEngine.every_way if side is ConformSide.OURS else () if command is None else command.ways
    chosen = cells(profile, architectures, types, prompts, modes, served.MODES if server else modes_of(ways))
    if command is not None and not cluster:  # on a cluster, the command exists only where the workers run
        command.check()
    name = command.name if command is not None else side.value if side is not None else ""
    folder = out or Path("runs") / f"conform-{name}"
    count = workers or (1 if cluster else fitting())
    if count > 1 and given["threads"] is None:
        given["threads"] = 1  # of each llama.cpp: the workers take the cores
    settings = Settings(
        Request(model=Path(), **given),
        folder.absolute() if cluster else folder,
        explain,
        asking if server else None,
        hf_engine if side is ConformSide.HF else None,
    )
    with GrowingTable(table) as rows, Shown(output_format) as shown:

        def progress(*finished: Any) -> None:
            rows(*finished)
            shown(*finished)

        conformance = run(ConformRequest(settings, tuple(chosen), count, cluster or ""), progress)
    raise typer.Exit(show(conformance, output_format, junit=junit, table=table))
