"""`parity dump`: one side only."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from checkpoints.printable import printable

from . import options as o
from .empty_options import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Write one side's dump: `dump ours` (our engine), `dump ref` (llama.cpp) or `dump hf` (Hugging Face).",
)

OutOption = Annotated[Path, typer.Option("--out", "-o", help="The dump to write.")]


@app.command("ours", short_help="Run a prompt through our engine.")
@o.fills(
    *(
        "model",
        "prompt",
        "mode",
        "backend",
        "devices",
        "points",
        "layers",
        "positions",
        "slice",
        "full",
        "binary",
        "first_position",
    )
)
def ours(given: o.Given, context: typer.Context, out: OutOption) -> None:
    """Run a prompt through our engine and write the computed values."""
    if given["points"] != "default":
        o.refuse_unused(context, "layers", "chooses among the default points", "Leave --points out, or name layers there.")
    from ..run import one_side
    from ..run.request import Request
    from .output import progress_bar, written

    with progress_bar(o.Format.TEXT) as progress:
        one_side.dump_ours(Request(**given), out, progress)
    written(out, *_beside(out, given))


@app.command("ref", short_help="Run a prompt, or the tokens of your dump, through llama.cpp.")
@o.fills(
    *(
        "model",
        "optional_prompt",
        "mode",
        "points",
        "layers",
        "positions",
        "slice",
        "generate",
        "full",
        "binary",
        "window",
        "threads",
    ),
    *("first_position", "verbose", "mapping"),
)
def ref(
    given: o.Given,
    context: typer.Context,
    out: OutOption,
    follow: Annotated[
        Path | None,
        typer.Option(
            "--follow",
            help="Use the tokens (generated ones too), points and positions from this dump, and run llama.cpp on them.",
        ),
    ] = None,
) -> None:
    """Run a prompt through llama.cpp and write the computed values; works for any architecture that llama.cpp has."""
    from checkpoints.formats import load

    from ..run import one_side
    from ..run.prompt import given_prompt
    from ..run.request import Request
    from .output import notes, written

    if follow is None and given["prompt"] is given["tokens"] is None:
        given_prompt(None, None, None)
    if follow is None:
        o.refuse_unused(context, "names offset", "is for the dump that --follow names")
    else:
        o.refuse_unused(context, "points layers positions", "is what --follow takes from that dump")
    if given["points"] != "default":
        o.refuse_unused(context, "layers", "chooses among the default points", "Leave --points out, or name layers there.")
    if given["mode"] != "exact":
        o.refuse_unused(context, "window", "works in exact mode only")
    mapping = given.pop("mapping")  # for the dump that is followed: llama.cpp's own names need none
    followed = load(follow, mapping) if follow is not None else None
    if followed is not None and followed.tokens:
        o.refuse_unused(context, "generate", "is what --follow takes from that dump")
    result = one_side.dump_reference(Request(**given), out, followed)
    left = [name for name in followed.points if name not in result.points] if followed is not None else []
    if followed is not None:
        notes(followed)
    if left:
        print(f"left out, because llama.cpp has no such point: {printable(', '.join(left), 1000)}", file=sys.stderr)
    written(out, *_beside(out, given))


def _beside(out: Path, given: o.Given) -> list[Path]:
    """The files of arrays that a dump of these options has beside its lines."""
    from checkpoints import columns, tensors

    return [place.beside(out) for place, wanted in ((columns, given["binary"]), (tensors, given["full"])) if wanted]


@app.command("hf", short_help="Run a prompt through a Hugging Face model.")
@o.fills("hugging_face", "prompt", "all_points", "positions", "slice", "full")
def hf(
    given: o.Given,
    out: OutOption,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", help="GGUF file, or a folder with config.json and safetensors; default: the stories model."
        ),
    ] = None,
) -> None:
    """Run a prompt through transformers, in float32 with eager attention, and write the values under llama.cpp's names.

    It runs in a Python interpreter of yours that has torch and transformers (--python). For a GGUF file the token ids are
    llama.cpp's, and a note says whether transformers' tokenizer disagrees; for a folder they are transformers' own.
    """
    from ..models.embedded import path as embedded
    from ..run.one_side import dump_hugging_face
    from .output import progress_bar, written

    with progress_bar(o.Format.TEXT) as progress:
        note = dump_hugging_face(model or embedded(), given, out, progress)
    if note:
        print(f"note: {note}", file=sys.stderr)
    written(out)
