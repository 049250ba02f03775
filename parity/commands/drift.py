"""`parity drift`: golden dumps for CI."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError

from . import options as o
from .empty_options import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Notice when numbers change: record golden dumps, check against them in CI, follow the margins over commits.",
)


FolderArgument = Annotated[Path, typer.Argument(help="Folder of `parity drift record`.", show_default=False)]
LedgerOption = Annotated[
    Path | None, typer.Option("--ledger", help="File with the history of checks; default: FOLDER/ledger.jsonl.")
]


@app.command("record", short_help="Write a golden dump of every prompt.")
@o.fills("model", "command", "mode", "points", "slice", "threads", "backend")
def record(
    given: o.Given,
    context: typer.Context,
    prompts: Annotated[Path, typer.Option("--prompts", help="Prompts, one per line, UTF-8; \\n in a line is a line break.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the golden dumps.")],
    side: Annotated[
        o.SideChoice,
        typer.Option(
            "--side", help="Whose numbers are golden: llama.cpp's (ref) or our engine's (ours); --exec records your engine's."
        ),
    ] = o.SideChoice.REF,
    generate: Annotated[
        int, typer.Option("--generate", min=0, help="Decode steps after each prompt, along llama.cpp's tokens.")
    ] = 1,
) -> None:
    """Write a golden dump of every prompt: small enough to commit."""
    from reports.sentences import uncompared

    from ..drift import recording
    from ..run.request import Request
    from ..run.sides import EXEC
    from .output import progress_bar, written

    if given["command"] is not None:
        o.refuse_unused(context, "side", "is not the engine that --exec runs", "Use one of them.")
    if given["command"] is not None or side is not o.SideChoice.OURS:
        o.refuse_unused(context, "backend", "is for the engine that comes with parity", "Add --side ours.")
    source = side.value if given["command"] is None else EXEC
    request = recording.GoldenRecording(Request(**given, generate=generate), prompts, out, source)
    with progress_bar(o.Format.TEXT) as progress:
        recorded = recording.record(request, progress)
    for prompt in recorded.golden.prompts:
        written(recorded.golden.path(prompt))
    for file, lacking in recorded.lacking.items():
        sentence = f"note: {file} is recorded as far as the engine went ({uncompared(lacking)}): check will not see the rest"
        print(sentence, file=sys.stderr)


@app.command("check", short_help="Compare with the golden dumps.")
@o.fills("command", "tolerance", "compute", "threads", "backend")
def check(
    given: o.Given,
    context: typer.Context,
    folder: FolderArgument,
    ours: Annotated[
        list[Path] | None, typer.Option("--ours", help="Dumps of your engine, one for each prompt; repeat the option.")
    ] = None,
    side: Annotated[
        o.SideChoice | None,
        typer.Option("--side", help="Run our engine (ours) or llama.cpp (ref); default: the side that was recorded."),
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="GGUF file, if it has moved since the recording.")] = None,
    mode: Annotated[o.Mode | None, typer.Option("--mode", help="Refuse golden dumps recorded in another mode.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Refuse golden dumps of prompts other than these.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Rewrite the golden records of points that moved.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 also if an error grows within its limit.")] = False,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="For `git bisect run`: exit 125 instead of 2 if a commit cannot be tested.")
    ] = False,
    ledger: LedgerOption = None,
    no_ledger: Annotated[bool, typer.Option("--no-ledger", help="Don't add this check to the ledger.")] = False,
    workers: Annotated[
        int, typer.Option("--workers", min=1, max=256, help="Number of processes that run prompts; each loads the model once.")
    ] = 1,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Run prompts on a Dask cluster instead: tcp://host:8786.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write JUnit XML: one case for each point.")] = None,
    summary: Annotated[Path | None, typer.Option("--summary", help="Append Markdown to this file (a job summary).")] = None,
    output_format: o.AnswerOption = o.AnswerFormat.TEXT,
) -> None:
    """Run our engine, llama.cpp or yours again (or read its dumps) and compare with the golden dumps.

    Exits 0 if no number moved beyond its limit, 1 for drift, 2 if the model, the prompts or the mode changed. With
    --bisect, 125 replaces 2: `git bisect run parity drift check FOLDER --exec CMD --bisect`.
    """
    del bisect  # __main__ maps the exit code, those of wrong options included
    if sum(chosen not in (None, []) for chosen in (ours, given["command"], side)) > 1:
        raise InputError("more than one side was given.", "Use one of --ours, --exec and --side.", code="usage")
    if ours:
        o.refuse_unused(context, "threads backend workers cluster model", "has no effect on dumps: nothing is computed")
    if no_ledger:
        o.refuse_unused(context, "ledger", "is not written with --no-ledger", "Use one of them.")
    from ..drift import checking
    from ..drift.golden import load
    from ..drift.ledger import NAME
    from .drift_output import show
    from .output import progress_bar

    inputs = load(folder).inputs(model)
    o.keep_inputs([] if ledger is None else [ledger], inputs)
    o.keep_inputs([path for path in (junit, summary) if path is not None], (*inputs, ledger or folder / NAME))
    request = checking.Checking(
        folder=folder,
        model=model,
        side=side.value if side else None,
        dumps=tuple(ours or ()),
        mode=mode.value if mode else None,
        prompts=prompts,
        update=update,
        ledger=ledger,
        keep_ledger=not no_ledger,
        workers=workers,
        cluster=cluster or "",
        **given,
    )
    with progress_bar(o.Format.TEXT if output_format is o.AnswerFormat.TEXT else o.Format.JSON) as progress:
        answer = checking.check(request, progress)
    raise typer.Exit(show(answer, output_format, junit, summary, strict=strict))


@app.command("history", short_help="Show the margins of all checks over commits.")
def history(
    folder: Annotated[
        Path, typer.Argument(help="Folder of `parity drift record`, or of `parity conform`.", show_default=False)
    ],
    ledger: LedgerOption = None,
    since: Annotated[
        str,
        typer.Option(
            "--since", help="List what came closer to its limit since then: days (7d), weeks (2w) or a date (2026-11-19)."
        ),
    ] = "7d",
    html: Annotated[Path | None, typer.Option("--html", help="Write a report with the margins drawn.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 if an error grows or comes close to its limit.")] = False,
    output_format: o.FormatOption = o.Format.TEXT,
) -> None:
    """Show the margins of all checks over commits, and warn before a limit is reached.

    For a folder of `parity conform` each cell of the matrix is a line: which one came closer to its limit since last week?

      parity drift history runs/conform-engine --since 7d
    """
    from ..drift.ledger import NAME
    from .drift_output import show_history

    if html is not None:
        o.keep_inputs([html], [ledger or folder / NAME, *folder.glob("*.json*")])
    raise typer.Exit(show_history(folder, ledger, html, output_format, strict=strict, since=since))
