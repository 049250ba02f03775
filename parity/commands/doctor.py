"""`parity doctor`: what is installed, what is missing, what the cache contains."""

from typing import Annotated

import typer

from . import options as o


def doctor(
    empty_cache: Annotated[bool, typer.Option("--empty-cache", help="Delete the cached F32 twins.")] = False,
    output_format: o.FormatOption = o.Format.TEXT,
) -> None:
    """Show versions, llama.cpp's backends, CUDA, and the cache of F32 twins."""
    from ..doctor.health import check
    from .output import print_facts

    print_facts(check(empty_cache=empty_cache), output_format)
