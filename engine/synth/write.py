"""Writes the table of contents of a GGUF of given metadata and tensors, and makes the weights for it."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import InputError
from checkpoints.whole_file import unwritable

from .data import Convert, Portions, converted
from .data import TensorData as Stored
from .header import add_tokenizer, close_header
from .recipe import Recipe, Tensor, Value
from .shape import Shape
from .values import values


def write(
    out: Path,
    recipe: Recipe,
    shape: Shape,
    changes: Mapping[str, Value],
    tensors: Sequence[Tensor] = (),
    *,
    tokenizer: Path | None = None,
) -> None:
    """Write the model's table of contents, with F32 weights that are missing; without tensors only its metadata.

    Raises:
        InputError: an unwritable file, or a tokenizer that is larger than the vocabulary.
    """
    import gguf

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(out, recipe.architecture)
        # Not the architecture's name: where llama.cpp reads "phi3" in it, it edits tokens that this vocabulary lacks.
        writer.add_name(f"synthetic-{shape.layers}x{shape.width}")
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for key, value in recipe.values(shape, changes).items():
            _add_value(writer, key, value)
        add_tokenizer(writer, shape, tokenizer)
        for name, dims in tensors:
            writer.add_tensor_info(name, dims, np.dtype(np.float32), 4 * int(np.prod(dims)))
        close_header(writer)
    except OSError as error:
        raise unwritable(out, error, "Choose another -o.") from error


def weights(
    recipe: Recipe, shape: Shape, tensors: Sequence[Tensor], seed: int, types: Mapping[str, int], convert: Convert
) -> list[Stored]:
    """The tensors as ggml types, in the order of `types`, each made whole; the same for the same names, shapes and seed."""
    dims = dict(tensors)

    def whole(name: str) -> Portions:
        yield values(name, dims[name], seed=seed, layers=shape.layers, width=shape.width, qk_norm=recipe.qk_norm)

    return [converted(prod(dims[name]), types[name], partial(whole, name), convert) for name in types]


def _add_value(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        if not -(1 << 31) <= value < 1 << 32:
            raise InputError(f"{key} is {value}, which does not fit 32 bits.", "Change the shape or --set.", code="shape")
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
