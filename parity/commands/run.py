"""`parity run`: both sides, the comparison, one screen."""

from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError

from ..run.prompt import given_prompt, numbers
from . import options as o


def run(
    model: o.ModelOption = None,
    prompt: o.PromptOption = None,
    prompt_file: o.PromptFileOption = None,
    tokens: o.TokensOption = None,
    mode: o.ModeOption = o.Mode.EXACT,
    backend: o.BackendOption = o.BackendName.AUTO,
    devices: o.DevicesOption = None,
    command: Annotated[
        str | None,
        typer.Option(
            "--exec", help="A foreign engine as our side: 'CMD {model} {tokens} {out}'; {model} is the F32 twin in exact mode."
        ),
    ] = None,
    points: o.PointsOption = "default",
    layers: o.LayersOption = None,
    positions: o.PositionsOption = "all",
    slice_size: o.SliceOption = 16,
    generate: Annotated[
        int, typer.Option("--generate", min=0, help="Tokens to generate: llama.cpp chooses, ours is led along.")
    ] = 0,
    full: o.FullOption = False,
    window: o.WindowOption = "auto",
    threads: o.ThreadsOption = None,
    first_position: o.FirstOption = 0,
    tolerance: o.ToleranceOption = None,
    strict: o.StrictOption = False,
    compute: o.ComputeOption = None,
    names: o.MapOption = None,
    offset: o.OffsetOption = None,
    despite_lint: o.DespiteLintOption = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; default: runs/<time>-<model>.")] = None,
    form: o.FormatOption = o.Format.TEXT,
    verbose: o.VerboseOption = False,
) -> None:
    """Run a prompt through our engine (or yours, --exec) and llama.cpp, and find the first divergence.

    Exits 0 for parity, 1 for a divergence.
    """
    from reference.child import Child

    text, ids = given_prompt(prompt, prompt_file, tokens)
    if command is None and (names is not None or offset is not None):
        raise InputError("--map and --offset are for a foreign engine.", "Give its command with --exec.", code="exec")
    mapping = o.mapping(names, offset)
    child = Child(verbose)  # it imports llama.cpp while this process imports all the rest
    from reference.client import Reference

    started = Reference(verbose=verbose, threads=threads, child=child)
    from ..models.embedded import path as default_model
    from ..run import session
    from ..run.request import Request
    from .comparison_output import finish, prepare
    from .output import progress_bar

    request = Request(
        model=model or default_model(),
        prompt=text,
        tokens=ids,
        mode=mode.value,
        backend=backend.value,
        devices=o.devices(devices),
        command=command,
        points=points,
        layers=numbers(layers, "--layers") if layers is not None else None,
        positions=o.positions(positions),
        slice_size=slice_size,
        full=full,
        generate=generate,
        window=o.window(window),
        threads=threads,
        first_position=first_position,
        tolerance=tolerance,
        strict=strict,
        compute=compute.value if compute else None,
        despite_lint=despite_lint,
        mapping=mapping,
        out=out,
        verbose=verbose,
    )
    with progress_bar(form) as progress:
        outcome = session.run(request, progress, started, lambda: prepare(form))
    raise typer.Exit(finish(outcome, form))
