"""`parity emit`: what an engine of your own needs to write dumps."""

from enum import StrEnum
from typing import Annotated

import typer


class Language(StrEnum):
    """Whose engine is to write."""

    C = "c"
    PYTHON = "python"
    RUST = "rust"
    HUGGING_FACE = "hf"


def emit(
    language: Annotated[
        Language, typer.Argument(help="c (and C++, CUDA), python, rust, or hf: a Hugging Face model.", show_default=False)
    ],
) -> None:
    """Print the one file that your engine needs to write dumps: parity emit c > parity_dump.h.

    It copies values as soon as they are computed, with the statistics and the sketch that a whole row's comparison needs.
    """
    import sys

    from ..emit import source

    sys.stdout.write(source(language.value))
