"""Another llama.cpp than the installed one: the bindings of another environment, or another build of its library."""

import json
import subprocess
from pathlib import Path

from msgspec import Struct

from checkpoints.errors import InputError
from checkpoints.printable import printable

PACKAGE_VARIABLE = "PARITY_LLAMA_CPP"  # read by our child process: the folder of the package `llama_cpp` that it binds
LIBRARY_VARIABLE = "LLAMA_CPP_LIB_PATH"  # read by llama-cpp-python: the folder of libllama
_PROBE = (
    "import importlib.util as u, json; s = u.find_spec('llama_cpp'); "
    "print(json.dumps(list(s.submodule_search_locations or ()) if s else []))"
)
_SECONDS = 60.0


class Build(Struct, frozen=True):
    """A llama.cpp: the folders of its Python bindings and of its libraries, None for those that are installed here."""

    package: Path | None = None
    library: Path | None = None

    def environment(self) -> dict[str, str]:
        """The environment variables with which a child process binds it."""
        given = {PACKAGE_VARIABLE: self.package, LIBRARY_VARIABLE: self.library}
        return {name: str(path) for name, path in given.items() if path is not None}


def of_interpreter(python: str) -> Build:
    """The llama-cpp-python of another Python's environment. Our own interpreter loads it; that environment needs nothing else.

    Raises:
        InputError: there is no such interpreter, or it has no llama-cpp-python.
    """
    shown = printable(python)
    try:
        done = subprocess.run(
            [python, "-P", "-c", _PROBE],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
        )
        folders = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else f"it did not answer within {_SECONDS:g} seconds"
        )
        raise InputError(f"cannot run {shown}: {reason}.", "Check --ref-python.", code="python") from error
    except ValueError:
        raise InputError(f"{shown} is not Python 3.11 or newer.", "Check --ref-python.", code="python") from None
    if not isinstance(folders, list) or not folders:
        raise InputError(f"{shown} has no llama-cpp-python.", "Install it there: pip install llama-cpp-python.", code="python")
    package = Path(str(folders[0]))
    if not (package / "llama_cpp.py").is_file():
        raise InputError(
            f"{shown} has a llama_cpp without bindings in {printable(str(package))}.", "Install it again.", code="python"
        )
    return Build(package)


def of_library(path: Path) -> Build:
    """A build of libllama of the installed bindings' version: its file, or the folder with libllama and libggml-base.

    Raises:
        InputError: there is no such build.
    """
    folder = path if path.is_dir() else path.parent
    if not (list(folder.glob("libllama.so")) or list(folder.glob("libllama.dylib"))) or not path.exists():
        raise InputError(
            f"{path} is neither a libllama nor a folder that contains one.",
            "Check --ref-lib and $LLAMA_CPP_LIB.",
            code="library",
        )
    return Build(library=folder.resolve())
