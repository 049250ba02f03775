"""qwen2 and llama of any shape, from a list of tensors of our own: llama.cpp is not needed.

The scale of the weights is that of trained models, so that hidden states stay realistic: a matrix is N(0, 1/in), one that adds to
the residual stream is smaller by sqrt(2 · layers) (GPT-2's initialisation), norms are near 1 with a few strong channels,
as in trained models (Dettmers et al. 2022, "LLM.int8()").
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import InputError
from checkpoints.gguf_file import contents
from checkpoints.room import require_room
from checkpoints.whole_file import unwritable

from .blocks import SIZE, BlockStore
from .data import PORTION, Convert, Portions, Progress, Tensor, append, converted, normal

OUTLIERS = 3  # channels of a norm, and elements of a key bias, that stand out
OUTLIER_SIZE = 4.0  # times the others; a choice, so that a few channels carry much of each sum, as in trained models
# Random queries and keys at full scale give scores of ±90 and a softmax so sharp that float32's rounding grows to 1e-10 within
# two layers; at half the scale the scores are like those of the trained stories model (a root mean square of 5 to 35).
QK_SCALE = 0.5
# Llama 3.1's frequency factors: from 1 for fast rotations to 8 for slow ones (rope_freqs.weight of its GGUF files).
SLOWEST_FACTOR = 8.0

MOST_LAYERS = 512  # LLAMA_MAX_LAYERS in llama.cpp's llama-hparams.h
_BYTES_AN_ELEMENT = (
    48  # of a portion: float32 weights, their copy in the file's type, and gguf-py's working memory, a core each
)
_BYTES_A_TOKEN = 400  # three Python objects and gguf-py's copies of them


@dataclass(frozen=True)
class Shape:
    """The shape of a model to make; `head_size` and `rope_dims` of 0 mean width / heads and the head size."""

    architecture: str = "qwen2"
    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 0
    ff: int = 128
    vocab: int = 2048
    tied: bool = False
    biases: bool = True
    eps: float = 1e-6
    rope_base: float = 1e6
    rope_dims: int = 0
    rope_factors: bool = False
    rope_scaling: float = 1.0  # factor of linear scaling; 1 writes none
    context: int = 32768

    @property
    def head(self) -> int:
        """The size of one head."""
        return self.head_size or self.width // self.heads


# From the models' own config.json.
PRESETS: Mapping[str, Shape] = {
    "tiny": Shape(),
    "tiny-llama": Shape("llama", biases=False, eps=1e-5, rope_base=10000.0),
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 14, 2, 0, 4864, 151936, tied=True),
    "qwen2.5-1.5b": Shape("qwen2", 28, 1536, 12, 2, 0, 8960, 151936, tied=True),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 28, 4, 0, 18944, 152064),
    "tinyllama-1.1b": Shape("llama", 22, 2048, 32, 4, 0, 5632, 32000, biases=False, eps=1e-5, rope_base=10000.0, context=2048),
    "llama-3.2-1b": Shape(
        "llama",
        16,
        2048,
        32,
        8,
        64,
        8192,
        128256,
        tied=True,
        biases=False,
        eps=1e-5,
        rope_base=5e5,
        rope_factors=True,
        context=131072,
    ),
    "llama-3.1-8b": Shape(
        "llama", 32, 4096, 32, 8, 128, 14336, 128256, biases=False, eps=1e-5, rope_base=5e5, rope_factors=True, context=131072
    ),
}


def shape_like(like: str, **changes: Any) -> Shape:
    """A preset with the given fields changed; a field of None stays unchanged.

    Raises:
        InputError: no such preset, or a shape that no engine could run.
    """
    if like not in PRESETS:
        raise InputError(f"there is no shape {like!r}.", f"Take one of {', '.join(PRESETS)}.", code="shape")
    shape = replace(PRESETS[like], **{name: value for name, value in changes.items() if value is not None})
    numbers = {field.name: getattr(shape, field.name) for field in fields(shape) if field.type in (int, "int")}
    small = [name for name, value in numbers.items() if value < (0 if name in ("head_size", "rope_dims") else 1)]
    large = [name for name, value in numbers.items() if value >= 1 << 32]  # GGUF keeps these as uint32
    rules = {
        f"--{large[0].replace('_', '-') if large else ''} is too large": bool(large),
        f"--{small[0].replace('_', '-') if small else ''} is too small": bool(small),
        f"llama.cpp runs at most {MOST_LAYERS} layers": shape.layers > MOST_LAYERS,
        "only qwen2 and llama are supported": shape.architecture not in ("qwen2", "llama"),
        f"{shape.heads} heads cannot share {shape.kv_heads} key/value heads evenly": bool(
            not small and shape.heads % shape.kv_heads
        ),
        f"a width of {shape.width} is not a multiple of {shape.heads} heads": not shape.head_size
        and bool(shape.width % max(shape.heads, 1)),
        "llama.cpp's qwen2 has heads of width / heads only": shape.architecture == "qwen2"
        and shape.head * shape.heads != shape.width,
        f"a head of {shape.head if not small else 0} cannot be rotated in pairs": not small and bool(shape.head % 2),
        f"llama.cpp's {shape.architecture} rotates whole heads, not {shape.rope_dims} elements of {shape.head if not small else 0}": (
            not small and shape.rope_dims not in (0, shape.head)
        ),
    }
    wrong = [sentence for sentence, broken in rules.items() if broken]
    if wrong:
        raise InputError(f"{wrong[0]}.", "Change the shape.", code="shape")
    return shape


def synthesize(
    out: Path,
    shape: Shape,
    *,
    weight_type: str = "f16",
    seed: int = 0,
    tokenizer: Path | None = None,
    blocks: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write a GGUF of that shape, a few rows at a time, and return its size in bytes.

    Args:
        weight_type: of the matrices: f32, f16, bf16, or a type that gguf-py can quantise (q4_0, q4_1, q5_0, q5_1, q8_0).
        tokenizer: a GGUF whose tokenizer is copied, padded to the vocabulary; None writes none ("no_vocab").
        blocks: see `weights`.

    Raises:
        InputError: a type that gguf-py cannot make or that does not fit the shape, or an unwritable file.
    """
    import gguf

    kind = _type(weight_type)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    odd = next((name for name, dims in _matrices(shape) if dims[-1] % block), None)
    if odd is not None:
        raise InputError(
            f"{odd} has rows that are not a multiple of {weight_type}'s blocks of {block}.", "Change the shape.", code="shape"
        )
    sizes = [_stored(dims, kind if len(dims) == 2 else gguf.GGMLQuantizationType.F32)[2] for _, dims in _tensors(shape)]
    check_size(out, sum(sizes), shape.vocab if tokenizer is not None else 0)

    def stored(rows: NDArray[np.float32], number: int) -> NDArray[Any]:
        made: NDArray[Any] = gguf.quants.quantize(rows, gguf.GGMLQuantizationType(number))
        return made

    types = {name: int(kind if len(dims) == 2 else gguf.GGMLQuantizationType.F32) for name, dims in _tensors(shape)}
    try:
        write_header(out, shape, tokenizer, kind)
        append(out, weights(shape, seed, types, stored, blocks), progress)
    except OSError as error:
        raise unwritable(out, error, "Choose another -o.") from error
    return out.stat().st_size


def weights(shape: Shape, seed: int, types: Mapping[str, int], convert: Convert, blocks: int | None = None) -> list[Tensor]:
    """The tensors of a model as ggml types, in the order of `types`; the same for the same shape, seed and types.

    Args:
        types: tensor -> ggml type.
        blocks: draw matrices from a store of so many blocks instead of making every weight (see `BlockStore`). A matrix whose rows
            are no multiple of them is made as ever.
    """
    store = BlockStore(blocks, seed, convert) if blocks is not None else None
    tensors: dict[str, Tensor] = {}
    for index, (name, dims) in enumerate(_tensors(shape)):
        if store is not None and len(dims) == 2 and dims[1] % SIZE == 0:
            tensors[name] = store.tensor(types[name], _scale(name, dims, shape), prod(dims), [seed, index])
        else:
            tensors[name] = converted(prod(dims), types[name], partial(_values, name, dims, shape, [seed, index]), convert)
    return [tensors[name] for name in types]


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
    for name, dims in _tensors(shape):
        stored = kind if len(dims) == 2 else gguf.GGMLQuantizationType.F32
        dtype, raw_dtype, nbytes = _stored(dims, stored)
        writer.add_tensor_info(name, dims if raw_dtype is None else _byte_shape(dims, stored), dtype, nbytes, raw_dtype)
    close_header(writer)


def close_header(writer: Any) -> None:
    """Write what a `GGUFWriter` was told of, without tensors' data."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def check_size(out: Path, size: int, tokens: int, largest: int = PORTION) -> None:
    """Refuse a model that the disk or the memory cannot hold while it is made.

    Args:
        size: bytes of its tensors in the file.
        tokens: entries of its tokenizer, whose texts are Python objects while they are written.
        largest: elements that are made at once.

    Raises:
        InputError: there is too little disk space or memory.
    """
    require_room(out, size, _BYTES_AN_ELEMENT * largest + _BYTES_A_TOKEN * tokens)


def _type(name: str) -> Any:
    import gguf

    possible = {kind.name.lower(): kind for kind in (gguf.GGMLQuantizationType.F32, *_quantizable())}
    if name.lower() not in possible:
        raise InputError(f"gguf cannot make weights of type {name!r}.", f"Take one of {', '.join(possible)}.", code="type")
    return possible[name.lower()]


def _quantizable() -> tuple[Any, ...]:
    from gguf import GGMLQuantizationType as Kind

    return (Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)


def _stored(dims: tuple[int, ...], kind: Any) -> tuple[Any, Any, int]:
    """What GGUFWriter must be told of a tensor: NumPy dtype, ggml type (for types that NumPy lacks), bytes."""
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
            "Take --stub-vocabulary or a larger --vocab.",
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


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and row-major shapes of all tensors, in the order of the file."""
    q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    yield "token_embd.weight", (shape.vocab, shape.width)
    if shape.rope_factors:
        yield "rope_freqs.weight", ((shape.rope_dims or shape.head) // 2,)
    for i in range(shape.layers):
        at = f"blk.{i}."
        yield at + "attn_norm.weight", (shape.width,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{at}attn_{name}.weight", (rows, shape.width)
            if shape.biases:
                yield f"{at}attn_{name}.bias", (rows,)
        yield at + "attn_output.weight", (shape.width, q)
        yield at + "ffn_norm.weight", (shape.width,)
        yield at + "ffn_gate.weight", (shape.ff, shape.width)
        yield at + "ffn_up.weight", (shape.ff, shape.width)
        yield at + "ffn_down.weight", (shape.width, shape.ff)
    yield "output_norm.weight", (shape.width,)
    if not shape.tied:
        yield "output.weight", (shape.vocab, shape.width)


def _matrices(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, dims) for name, dims in _tensors(shape) if len(dims) == 2)


def _values(name: str, dims: tuple[int, ...], shape: Shape, seed: list[int]) -> Portions:
    rng = np.random.default_rng(seed)
    if len(dims) == 2:
        yield from normal(rng, dims, _scale(name, dims, shape))
    else:
        yield _vector(name, dims[0], rng)


def _scale(name: str, dims: tuple[int, ...], shape: Shape) -> float:
    """The standard deviation of a matrix's weights."""
    scale = 1.0 / sqrt(dims[1])
    if name.endswith(("attn_q.weight", "attn_k.weight")):
        scale *= QK_SCALE
    if name.endswith(("attn_output.weight", "ffn_down.weight")):
        scale /= sqrt(2 * shape.layers)
    return scale


def _vector(name: str, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    if name == "rope_freqs.weight":
        return np.geomspace(1.0, SLOWEST_FACTOR, size).astype(np.float32)
    if name.endswith("norm.weight"):
        weight = 1 + 0.1 * rng.standard_normal(size)
        weight[rng.choice(size, min(OUTLIERS, size), replace=False)] *= OUTLIER_SIZE
        return weight.astype(np.float32)
    bias = 0.5 * rng.standard_normal(size)
    if ".attn_k." in name:
        bias[rng.choice(size, min(OUTLIERS, size), replace=False)] *= OUTLIER_SIZE
    return bias.astype(np.float32)
