"""`parity model` and `parity tokens`: what an engine must know about a model and a prompt."""

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


def model(
    path: Annotated[
        Path | None, typer.Argument(metavar="M", help="GGUF file; default: the embedded stories model.", show_default=False)
    ] = None,
    output_format: o.FormatOption = o.Format.TEXT,
) -> None:
    """Show what an engine must know about a model: ε, RoPE kind and base, head size, tied output, and the points with their shapes."""
    from ..model.describe import describe
    from ..models.embedded import path as default_model
    from .output import print_facts, waiting

    with waiting("reading the model's graph", output_format):
        facts = describe(path or default_model())
    print_facts(facts, output_format)


@o.fills("model", "text")
def tokens(given: o.Given, output_format: o.FormatOption = o.Format.TEXT) -> None:
    """Show the token ids and pieces of a prompt as llama.cpp tokenizes it, special tokens included."""
    from reference.client import Reference

    from .output import print_tokens

    with Reference() as reference:
        tokenized = reference.tokenize(given["model"], given["prompt"])
    print_tokens(tokenized, output_format)
