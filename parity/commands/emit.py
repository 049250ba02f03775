"""`parity emit`: the file that your own engine needs to write dumps."""

from enum import StrEnum
from typing import Annotated

import typer


class Language(StrEnum):
    """The language or library of the engine that is to write dumps."""

    C = "c"
    PYTHON = "python"
    RUST = "rust"
    HUGGING_FACE = "hf"
    PYTEST = "pytest"


def emit(
    language: Annotated[
        Language,
        typer.Argument(
            help="c (and C++, CUDA), python, rust; hf: for a Hugging Face model; pytest: a fixture for your tests.",
            show_default=False,
        ),
    ],
) -> None:
    """Print the single file that your engine needs to write dumps: parity emit c > parity_dump.h.

    It copies values as soon as they are computed, with the statistics and the sketch needed to compare whole rows.

    `parity emit pytest > tests/parity_pytest.py` prints a fixture, parity_golden(dump, golden, model=…), whose failing assertion
    shows the first divergence and its cause.
    """
    import sys

    from ..emit import source

    sys.stdout.write(source(language.value))
