"""A sequence in progress on disk: what `llama_state_get_data` is to llama.cpp, as one safetensors file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import InputError
from checkpoints.whole_file import put

from .backend import Backend
from .engine import Progress

_ENCODED = "encoded"


def save(sequence: Progress, backends: Sequence[Backend], path: Path) -> None:
    """Write a sequence; `backends` are those of its caches, in their order.

    Raises:
        InputError: the file cannot be written, or the engine keeps the sequence where it cannot be read (no caches).
    """
    from safetensors.numpy import save as encoded_file

    if not sequence.caches:
        raise InputError("this engine keeps its sequence on the device and cannot save it.", "Use --mode exact.", code="state")
    arrays: dict[str, NDArray[Any]] = {}
    for number, (cache, backend) in enumerate(zip(sequence.caches, backends, strict=True)):
        arrays |= {f"{number}/{name}": np.ascontiguousarray(backend.to_host(value)) for name, value in cache.held().items()}
    if sequence.encoded is not None:
        arrays[_ENCODED] = np.ascontiguousarray(backends[0].to_host(sequence.encoded))
    facts = {"first": str(sequence.first), "length": str(sequence.length), "passes": str(sequence.passes)}
    put(path, encoded_file(arrays, facts))


def restore(path: Path, sequence: Progress, backends: Sequence[Backend]) -> None:
    """Fill a new, empty sequence with a saved one; `backends` are those of its caches, in their order.

    Raises:
        InputError: the file cannot be read, or another engine wrote it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        sequence.first, sequence.length, sequence.passes = (int(facts[name]) for name in ("first", "length", "passes"))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a state that this engine saved.", "Save it again.", code="state") from error
    if (encoded := arrays.pop(_ENCODED, None)) is not None:
        sequence.encoded = backends[0].array(encoded)
    for number, (cache, backend) in enumerate(zip(sequence.caches, backends, strict=True)):
        prefix = f"{number}/"
        with backend.current():
            cache.hold({name[len(prefix) :]: backend.array(value) for name, value in arrays.items() if name.startswith(prefix)})
