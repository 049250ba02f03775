"""Where does an engine part from llama.cpp? From Python: `read` a dump, `compare` two of them, or have the `table` of all records.

docs/python.md shows how; the commands are `parity.commands`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .interface import Dump, ParityError, Verdict, compare, read, table

__all__ = ["Dump", "ParityError", "Verdict", "compare", "read", "table", "version"]


def __getattr__(name: str) -> Any:
    """The names of `interface`, imported when they are first used: commands start without them."""
    if name in __all__:
        from . import interface

        return getattr(interface, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion offers: the names that are promised."""
    return sorted(__all__)


def version() -> str:
    """This parity's version: of the installed package, or of the source tree that it is run from without being installed."""
    import sys

    # `importlib.metadata` says the same once it has imported what reads electronic mail, which is 15 ms of every `parity run`.
    described = (metadata_folder for folder in sys.path for metadata_folder in Path(folder).glob("parity-*.dist-info"))
    if (installed := next(described, None)) is not None:
        return installed.name.removeprefix("parity-").removesuffix(".dist-info")
    from importlib import metadata

    try:
        return metadata.version("parity")
    except metadata.PackageNotFoundError:
        return f"{_project()['version']} (not installed)"


def requirements() -> tuple[str, ...]:
    """The distributions that parity needs, without its extras: "numpy", "gguf", …"""
    import re
    from importlib import metadata

    try:
        wanted = [line for line in metadata.requires("parity") or () if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        wanted = _project()["dependencies"]
    return tuple(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in wanted)


def _project() -> dict[str, Any]:
    """What the source tree's pyproject.toml says of the project; {} if only the packages were copied."""
    import tomllib

    try:
        text = Path(__file__).parent.with_name("pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return {"version": "unknown", "dependencies": []}
    return dict(tomllib.loads(text)["project"])
