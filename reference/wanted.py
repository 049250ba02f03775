"""The tensors that llama.cpp wants for given metadata: it builds the model from metadata alone and asks for them."""

import ctypes
import os
from pathlib import Path
from typing import Any

from checkpoints.errors import ModelError

from .library import Library
from .model import model_params


class _InitParams(ctypes.Structure):
    """`struct gguf_init_params` (gguf.h)."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def wanted_tensors(library: Library, path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and row-major shapes of every tensor, optional ones too, in the order in which llama.cpp asks for them.

    `path` is a GGUF that needs no tensors. Mirrors `llama_model_init_from_user`, which allocates the model.

    Raises:
        ModelError: llama.cpp cannot build a model from these metadata.
    """
    api: Any = library.api
    ggml = api._lib  # llama.cpp's library exports ggml's functions, too
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    ggml.gguf_free.argtypes = [ctypes.c_void_p]
    wanted: dict[str, tuple[int, ...]] = {}

    def note(address: int, _data: int | None) -> None:
        tensor = library.ggml.tensor(address)
        dims = tuple(int(n) for n in tensor.ne)[::-1]
        while len(dims) > 1 and dims[0] == 1:
            dims = dims[1:]
        wanted[tensor.name.decode()] = dims

    metadata = ggml.gguf_init_from_file(os.fsencode(path), _InitParams(True, None))
    callback = api.llama_model_set_tensor_data_t(note)
    params, _devices = model_params(api)
    library.lines.clear()
    model = api.llama_model_init_from_user(metadata, callback, None, params)
    ggml.gguf_free(metadata)
    if not model:
        raise ModelError(
            f"llama.cpp cannot make a model with these metadata: {library.reason()}.",
            "Change the shape or --set.",
            code="shape",
        )
    api.llama_model_free(model)
    return list(wanted.items())
