"""What llama.cpp's quantiser leaves undone in the files that it writes: tensors in their own type, and the alignment.

`llama_model_quantize` converts matrices; norms, biases, positions, and small matrices such as gemma3n's `altup_proj`, gemma's
`per_layer_model_proj` or RWKV's `time_mix_w1` stay as they are (`tensor_allows_quantization` in llama-quant.cpp), and files
have these as F16 or BF16 too. libggml's own functions dequantise them here, inside the file that llama.cpp wrote.
"""

import mmap
import os
from pathlib import Path

from msgspec.structs import replace

from checkpoints.gguf_file import Contents, TensorEntry, contents, header_bytes
from checkpoints.gguf_values import uint32_value

from .to_float import ToFloat

_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
_F32 = 0  # ggml_type
_INTEGERS = range(24, 28)  # I8, I16, I32, I64: tables of numbers, no weights


def is_f32(contents: Contents) -> bool:
    """Whether every weight is F32 already: such a model is its own twin."""
    return all(tensor.type == _F32 or tensor.type in _INTEGERS for tensor in contents.tensors)


def state_alignment(path: Path) -> None:
    """Correct the alignment stated in a file that llama.cpp's quantiser wrote.

    The quantiser always aligns by 32 bytes (`llama_model_quantize_impl` pads by GGUF_DEFAULT_ALIGNMENT), but copies the model's own
    alignment with the metadata: llama.cpp itself could not read the result.
    """
    file = contents(path)
    if file.alignment == _ALIGNMENT:
        return
    stated = file.metadata | {"general.alignment": uint32_value(_ALIGNMENT)}
    with path.open("r+b") as opened:
        opened.write(header_bytes(stated, list(file.tensors))[: file.header_end])


def dequantize_rest(path: Path) -> None:
    """Turn every weight of a file that is not F32 into F32, in place; types that libggml does not dequantise stay.

    Tensors grow, so those after them move. This is done from the last to the first, so that none is overwritten before it has moved.

    Raises:
        OSError: the disk has no room; ModelError: this is no GGUF file.
    """
    file = contents(path)
    if is_f32(file):
        return
    to_float = ToFloat()
    moved: list[TensorEntry] = []
    values: dict[str, bytes] = {}
    sizes: list[int] = []
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        ends = [tensor.offset for tensor in file.tensors[1:]] + [file.size - file.data]
        offset = 0
        for tensor, end in zip(file.tensors, ends, strict=True):
            size, kind = end - tensor.offset, tensor.type
            if kind != _F32 and kind not in _INTEGERS:
                begin = file.data + tensor.offset
                if (floats := to_float.padded(data[begin : begin + size], kind, tensor.elements)) is not None:
                    values[tensor.name], kind = floats.tobytes(), _F32
                    size = -(-len(values[tensor.name]) // file.alignment) * file.alignment
            moved.append(replace(tensor, type=kind, offset=offset))
            sizes.append(size)
            offset += size
        _extend(opened.fileno(), file.size, file.data + offset)
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as data:
        for old, new, size in reversed(list(zip(file.tensors, moved, sizes, strict=True))):
            begin = file.data + new.offset
            if old.name in values:
                data[begin : begin + size] = values[old.name].ljust(size, b"\0")
            elif new.offset != old.offset:
                data.move(begin, file.data + old.offset, size)
        data[: file.header_end] = header_bytes(file.metadata, moved)[: file.header_end]


def _extend(descriptor: int, size: int, new_size: int) -> None:
    """Give a file its new size, with room for it on the disk: without room, a write into a mapped hole would kill the process."""
    if hasattr(os, "posix_fallocate") and new_size > size:
        os.posix_fallocate(descriptor, size, new_size - size)
    else:
        os.truncate(descriptor, max(size, new_size))
