"""`parity dump`: one side only."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..run.prompt import given_prompt, numbers
from . import options as o

app = typer.Typer(no_args_is_help=True, help="Write one side's dump: `dump ours` (our engine) or `dump ref` (llama.cpp).")

OutOption = Annotated[Path, typer.Option("--out", "-o", help="The dump to write.")]


@app.command("ours", short_help="Run a prompt through our engine.")
def ours(
    out: OutOption,
    model: o.ModelOption = None,
    prompt: o.PromptOption = None,
    prompt_file: o.PromptFileOption = None,
    tokens: o.TokensOption = None,
    mode: o.ModeOption = o.Mode.EXACT,
    backend: o.BackendOption = o.BackendName.AUTO,
    devices: o.DevicesOption = None,
    points: o.PointsOption = "default",
    layers: o.LayersOption = None,
    positions: o.PositionsOption = "all",
    slice_size: o.SliceOption = 16,
    full: o.FullOption = False,
    first_position: o.FirstOption = 0,
) -> None:
    """Run a prompt through our engine and write what it computed."""
    from ..models.embedded import path as default_model
    from ..run import session
    from ..run.request import Request
    from .output import progress_bar, written

    o.no_input(out, model, prompt_file)
    text, ids = given_prompt(prompt, prompt_file, tokens)
    request = Request(
        model=model or default_model(),
        prompt=text,
        tokens=ids,
        mode=mode.value,
        backend=backend.value,
        devices=o.devices(devices),
        points=points,
        layers=numbers(layers, "--layers") if layers is not None else None,
        positions=o.positions(positions),
        slice_size=slice_size,
        full=full,
        first_position=first_position,
    )
    with progress_bar(o.Format.TEXT) as progress:
        session.dump_ours(request, out, progress)
    written(out)


@app.command("ref", short_help="Run a prompt through llama.cpp, or along your dump.")
def ref(
    out: OutOption,
    model: o.ModelOption = None,
    prompt: o.PromptOption = None,
    prompt_file: o.PromptFileOption = None,
    tokens: o.TokensOption = None,
    follow: Annotated[
        Path | None,
        typer.Option(
            "--follow", help="Take tokens (generated ones too), points and positions from this dump and lead llama.cpp along."
        ),
    ] = None,
    names: o.MapOption = None,
    offset: o.OffsetOption = None,
    mode: o.ModeOption = o.Mode.EXACT,
    points: o.PointsOption = "default",
    layers: o.LayersOption = None,
    positions: o.PositionsOption = "all",
    slice_size: o.SliceOption = 16,
    generate: Annotated[int, typer.Option("--generate", min=0, help="Tokens to generate greedily.")] = 0,
    full: o.FullOption = False,
    window: o.WindowOption = "auto",
    threads: o.ThreadsOption = None,
    first_position: o.FirstOption = 0,
    verbose: o.VerboseOption = False,
) -> None:
    """Run a prompt through llama.cpp and write what it computed; any architecture that llama.cpp has."""
    from ..models.embedded import path as default_model
    from ..run import session
    from ..run.request import Request
    from .output import notes, written

    o.no_input(out, model, prompt_file, follow, names)
    given = any(option is not None for option in (prompt, prompt_file, tokens))
    text, ids = given_prompt(prompt, prompt_file, tokens) if given or follow is None else (None, None)
    request = Request(
        model=model or default_model(),
        prompt=text,
        tokens=ids,
        mode=mode.value,
        points=points,
        layers=numbers(layers, "--layers") if layers is not None else None,
        positions=o.positions(positions),
        slice_size=slice_size,
        full=full,
        generate=generate,
        window=o.window(window),
        threads=threads,
        first_position=first_position,
        verbose=verbose,
    )
    followed = o.dump(follow, names, offset) if follow is not None else None
    found = session.dump_reference(request, out, followed)
    left = [name for name in followed.points if name not in found.points] if followed is not None else []
    if followed is not None:
        notes(followed)
    if left:
        print(f"left out, llama.cpp has no such point: {', '.join(left)}", file=sys.stderr)
    written(out)
