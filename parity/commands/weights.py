"""`parity weights`: every tensor dequantised three times, or an external engine's weights against the file."""

from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError

from . import options as o


@o.fills("model", "backend")
def weights(
    given: o.Given,
    context: typer.Context,
    theirs: Annotated[
        Path | None,
        typer.Option(
            "--theirs",
            help="Weights as your engine holds them after loading (leading values tell how they were read): safetensors, npz, or JSONL, "
            "under GGUF names; or another GGUF file of the model.",
        ),
    ] = None,
    hf: Annotated[
        Path | None,
        typer.Option(
            "--hf", help="The Hugging Face folder that the file was converted from: every tensor and config.json are compared."
        ),
    ] = None,
    output_format: o.FormatOption = o.Format.TEXT,
) -> None:
    """Are the weights read correctly? Every tensor is dequantised by us, by libggml and by gguf-py, byte for byte.

    Is your engine wrong from the first layer on? Dump the first hundred values of each weight as your engine holds it after
    loading, and give the file as --theirs: the answer for each tensor is equal, transposed, permuted, another tensor, off by a
    block, nibbles or scales swapped, wrong byte order, or where it first differs. What was not given was not seen: the answer says
    how much was.

    With --hf the file is compared with the folder of safetensors that it was converted from, allowing for the permutations, offsets,
    transpositions and stacks that converters make; missing, exchanged or wrongly converted tensors are named.

    Exits 0 if all are right, 1 if one is not.
    """
    from .output import answer, progress_bar

    if theirs is not None and hf is not None:
        raise InputError("Both --theirs and --hf were given.", "Use one of them.", code="theirs")
    if theirs is not None or hf is not None:
        o.refuse_unused(context, "backend", "chooses where tensors are dequantised for the check of the file itself")
    if hf is not None:
        from ..weights.conversion import check_conversion

        with progress_bar(output_format) as progress:
            checked = check_conversion(given["model"], hf, progress)
    elif theirs is not None:
        from ..weights.foreign_weights import check_foreign

        checked = check_foreign(given["model"], theirs)
    else:
        from ..weights.weights import check_weights

        with progress_bar(output_format) as progress:
            checked = check_weights(given["model"], given["backend"], progress)
    from reports import weights as report

    raise typer.Exit(answer(checked, report, output_format))
