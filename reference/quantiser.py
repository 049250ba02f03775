"""How llama.cpp would quantise a model: the table of contents of the file that it would write.

llama.cpp chooses a tensor's type by its name, its shape and its place among the others, never by its values. So a file that has a
table of contents and holes for weights is enough to ask (`dry_run` of `llama_model_quantize`).
"""

import ctypes
import os
import re
from pathlib import Path

from msgspec.structs import replace

from checkpoints.errors import ReferenceFailed
from checkpoints.gguf_file import TensorEntry, contents, header_bytes
from checkpoints.gguf_values import uint32_value

from .jobs import FilePlan
from .library import Library
from .to_float import base_library
from .twin import file_type

_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT, by which the quantiser pads tensors
_SET = ("general.quantization_version", "general.file_type")  # by the quantiser, whatever the model says
_QUANTISATION_VERSION = 2  # GGML_QNT_VERSION
# Of a line such as "[5/22] blk.0.attn_k.weight - [256, 64, 1, 1], type = f32, size = 0.06 MiB -> 0.01 MiB (q4_K)": the tensor, its
# type, and the one that it would get, where that is another.
_LINE = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+- \[.*?\], type =\s*(\S+), (?:.*-> +[\d.]+ MiB \((\S+?)\))?", re.MULTILINE)


def plan(library: Library, path: Path, ftype: str) -> FilePlan:
    """What `llama_model_quantize` would write for the model at `path`, which may have holes for weights.

    Raises:
        InputError: no such type; ReferenceFailed: llama.cpp refuses it, or the type needs an importance matrix.
    """
    from gguf import GGMLQuantizationType

    model = contents(path)
    types = _types(library, path, ftype)
    by_name = {tensor.name: tensor for tensor in model.tensors}
    numbers = {kind.name.lower(): int(kind) for kind in GGMLQuantizationType}
    if sorted(types) != sorted(by_name) or not set(types.values()) <= set(numbers):
        raise ReferenceFailed(
            "this llama.cpp does not say how it would quantise a model.", "Install llama-cpp-python 0.3.36.", code="abi"
        )
    tensors: list[TensorEntry] = []
    offset = 0
    for name, kind in types.items():
        tensor = replace(by_name[name], type=numbers[kind], offset=offset)
        if tensor.type != by_name[name].type and _needs_importance(tensor.type):
            raise ReferenceFailed(
                f"llama.cpp makes no {ftype.upper()} without an importance matrix, which {name} as {kind} needs.",
                "Use a type that needs none: q2_k, q4_k_m, iq4_xs, …",
                code="type",
            )
        tensors.append(tensor)
        offset += -(-library.ggml.row_size(tensor.type, tensor.elements) // _ALIGNMENT) * _ALIGNMENT
    # `llama_model_quantize_impl` copies the metadata and sets these two, which moves them to the end.
    metadata = {key: value for key, value in model.metadata.items() if key not in _SET}
    metadata |= {_SET[0]: uint32_value(_QUANTISATION_VERSION), _SET[1]: uint32_value(file_type(library, ftype))}
    header = header_bytes(metadata, tensors)
    return FilePlan(header, tuple(tensors), len(header) + offset)


def _types(library: Library, path: Path, ftype: str) -> dict[str, str]:
    """Tensor -> the name of the type that it would have, in the order of the file that llama.cpp would write."""
    api = library.api
    params = api.llama_model_quantize_default_params()
    if not hasattr(params, "dry_run"):
        raise ReferenceFailed(
            "this llama.cpp does not say how it would quantise a model.", "Install llama-cpp-python 0.3.36.", code="abi"
        )
    params.ftype, params.dry_run, params.allow_requantize = file_type(library, ftype), True, True
    library.lines.clear()
    with library.whole_log() as texts:
        status = api.llama_model_quantize(os.fsencode(path), os.fsencode(path) + b".none", ctypes.byref(params))
    if status != 0:
        raise ReferenceFailed(
            f"llama.cpp cannot write a model as {ftype.upper()}: {library.reason()}.", "--verbose shows llama.cpp's log."
        )
    return {name: (becomes or kind).lower() for name, kind, becomes in _LINE.findall("".join(texts))}


def _needs_importance(kind: int) -> bool:
    function = base_library().ggml_quantize_requires_imatrix
    function.argtypes, function.restype = [ctypes.c_int], ctypes.c_bool
    return bool(function(kind))
