"""llama-cpp-python's ctypes functions, without everything else that its package imports."""

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from .builds import PACKAGE_VARIABLE

_PACKAGE = "llama_cpp"


def bindings() -> Any:
    """The module `llama_cpp.llama_cpp`.

    The package's own `__init__` imports chat templates, caches and a sampler, which takes a third of the time until llama.cpp is
    ready. It is left out here: the package is located but not executed while its submodule is imported, and restored afterwards.

    Raises:
        ImportError: the package is missing, or its library cannot be loaded.
    """
    name = f"{_PACKAGE}.{_PACKAGE}"
    if name in sys.modules:
        return sys.modules[name]
    if (spec := _spec()) is None:
        raise ImportError(f"No module named {_PACKAGE!r}")
    sys.modules[_PACKAGE] = module_from_spec(spec)
    try:
        return import_module(name)
    finally:
        del sys.modules[_PACKAGE]


def _spec() -> ModuleSpec | None:
    """Where the package is: in the environment that this process was started for, else on the path."""
    if not (folder := os.environ.get(PACKAGE_VARIABLE)):
        return find_spec(_PACKAGE)
    return spec_from_file_location(_PACKAGE, Path(folder) / "__init__.py", submodule_search_locations=[folder])
