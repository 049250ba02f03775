"""The table of contents of a model with random weights: metadata, tokenizer, and its tensors without data."""

from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import InputError
from checkpoints.gguf_file import contents

from .shape import Shape, tensors_of


def write_header(out: Path, shape: Shape, tokenizer: Path | None, kind: Any = None) -> None:
    """Write a file's table of contents, without the weights: matrices of a `GGMLQuantizationType`, by default F32.

    Raises:
        InputError: a tokenizer that is larger than the vocabulary; OSError: the disk refuses it.
    """
    import gguf

    kind = gguf.GGMLQuantizationType.F32 if kind is None else kind
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, shape.architecture)
    _metadata(writer, shape, kind)
    add_tokenizer(writer, shape, tokenizer)
    for name, dims in tensors_of(shape):
        stored = kind if len(dims) == 2 else gguf.GGMLQuantizationType.F32
        dtype, raw_dtype, nbytes = stored_as(dims, stored)
        writer.add_tensor_info(name, dims if raw_dtype is None else _byte_shape(dims, stored), dtype, nbytes, raw_dtype)
    close_header(writer)


def close_header(writer: Any) -> None:
    """Write everything that a `GGUFWriter` was given, except the tensors' data."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def stored_as(dims: tuple[int, ...], kind: Any) -> tuple[Any, Any, int]:
    """How a tensor is described to GGUFWriter: NumPy dtype, ggml type (for types that NumPy lacks), bytes."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    nbytes = int(np.prod(dims)) // block * size
    if kind == gguf.GGMLQuantizationType.F32:
        return np.dtype(np.float32), None, nbytes
    if kind == gguf.GGMLQuantizationType.F16:
        return np.dtype(np.float16), None, nbytes
    return np.dtype(np.uint8), kind, nbytes


def _byte_shape(dims: tuple[int, ...], kind: Any) -> tuple[int, ...]:
    import gguf

    shape: tuple[int, ...] = tuple(gguf.quant_shape_to_byte_shape(dims, kind))
    return shape


def _metadata(writer: Any, shape: Shape, kind: Any) -> None:
    import gguf

    writer.add_name(f"synthetic-{shape.architecture}-{shape.layers}x{shape.width}")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"])
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.rope_dims or shape.head)
    if shape.rope_scaling != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shape.rope_scaling)
    writer.add_vocab_size(shape.vocab)


def add_tokenizer(writer: Any, shape: Shape, source: Path | None) -> None:
    """Copy the tokenizer of the GGUF `source`, padded to the vocabulary; None says that there is none ("no_vocab").

    Raises:
        InputError: the tokenizer has more tokens than the vocabulary.
    """
    if source is None:
        writer.add_tokenizer_model("no_vocab")
        return
    tokenizer = {key: value.plain() for key, value in contents(source).metadata.items() if key.startswith("tokenizer.")}
    have = len(tokenizer.get("tokenizer.ggml.tokens", ()))
    if have > shape.vocab:
        raise InputError(
            f"the tokenizer has {have:,} tokens, the vocabulary only {shape.vocab:,}.",
            "Use --stub-vocabulary or a larger --vocab.",
        )
    padding: dict[str, list[Any]] = {
        "tokenizer.ggml.tokens": [f"<|pad_{number}|>" for number in range(have, shape.vocab)],
        "tokenizer.ggml.token_type": [5] * (shape.vocab - have),  # LLAMA_TOKEN_TYPE_UNUSED
        "tokenizer.ggml.scores": [0.0] * (shape.vocab - have),
    }
    for key, value in tokenizer.items():
        if isinstance(value, list):
            writer.add_array(key, value + padding.get(key, []))
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, int(value))
