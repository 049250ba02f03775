"""The options for other versions of llama.cpp beside the installed one, and the builds that they name."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .values import Given

OPTIONS: dict[str, tuple[Any, Any]] = {
    "ref_python": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--ref-python",
                help="Also run another llama.cpp: the one of this interpreter's llama-cpp-python; can be repeated.",
                show_default=False,
            ),
        ],
        None,
    ),
    "ref_lib": (
        Annotated[
            Path | None,
            typer.Option(
                "--ref-lib",
                envvar="LLAMA_CPP_LIB",
                help="Also run another build of the installed version: the file or folder of its libllama.",
                show_default=False,
            ),
        ],
        None,
    ),
}


def others_field(ref_python: list[str] | None, ref_lib: Path | None) -> Given:
    """The other versions of llama.cpp to run, each located before anything is computed.

    Raises:
        InputError: an interpreter or a library does not exist, or has no llama.cpp.
    """
    if not ref_python and ref_lib is None:
        return {"others": ()}
    from reference.builds import of_interpreter, of_library

    from ...run.references import Other

    others = [Other(of_interpreter(python), python) for python in ref_python or ()]
    if ref_lib is not None:
        others.append(Other(of_library(ref_lib), str(ref_lib)))
    return {"others": tuple(others)}
