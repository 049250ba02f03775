"""qwen2 and llama of any shape, from a list of tensors of our own: llama.cpp is not needed.

The scale of the weights is that of trained models, so that hidden states stay realistic: a matrix is N(0, 1/in), one that adds to
the residual stream is smaller by sqrt(2 · layers) (GPT-2's initialisation), norms are near 1 with a few strong channels,
as in trained models (Dettmers et al. 2022, "LLM.int8()").
"""

from collections.abc import Mapping
from functools import partial
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import InputError
from checkpoints.room import require_room
from checkpoints.whole_file import unwritable

from .blocks import SIZE, BlockStore
from .data import PORTION, Convert, Portions, Progress, TensorData, ahead, append, converted, normal
from .header import stored_as, write_header
from .shape import Shape, matrices_of, tensors_of

OUTLIERS = 3  # channels of a norm, and elements of a key bias, that stand out
OUTLIER_SIZE = 4.0  # times the others; a choice, so that a few channels carry much of each sum, as in trained models
# Random queries and keys at full scale give scores of ±90 and a softmax so sharp that float32's rounding grows to 1e-10 within
# two layers; at half the scale the scores are like those of the trained stories model (a root mean square of 5 to 35).
QK_SCALE = 0.5
# Llama 3.1's frequency factors: from 1 for fast rotations to 8 for slow ones (rope_freqs.weight of its GGUF files).
SLOWEST_FACTOR = 8.0

# Of a portion: float32 weights, their copy in the file's type, and gguf-py's working memory, a core each.
_BYTES_AN_ELEMENT = 48
_BYTES_A_TOKEN = 400  # three Python objects and gguf-py's copies of them


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
    unaligned = next((name for name, dims in matrices_of(shape) if dims[-1] % block), None)
    if unaligned is not None:
        raise InputError(
            f"{unaligned} has rows that are not a multiple of {weight_type}'s blocks of {block}.",
            "Change the shape.",
            code="shape",
        )
    sizes = [stored_as(dims, kind if len(dims) == 2 else gguf.GGMLQuantizationType.F32)[2] for _, dims in tensors_of(shape)]
    check_size(out, sum(sizes), shape.vocab if tokenizer is not None else 0, at_once(shape, blocks))

    def stored(rows: NDArray[np.float32], number: int) -> NDArray[Any]:
        quantised: NDArray[Any] = gguf.quants.quantize(rows, gguf.GGMLQuantizationType(number))
        return quantised

    types = {name: int(kind if len(dims) == 2 else gguf.GGMLQuantizationType.F32) for name, dims in tensors_of(shape)}
    try:
        write_header(out, shape, tokenizer, kind)
        append(out, weights(shape, seed, types, stored, blocks), progress)
    except OSError as error:
        raise unwritable(out, error, "Choose another -o.") from error
    return out.stat().st_size


def weights(shape: Shape, seed: int, types: Mapping[str, int], convert: Convert, blocks: int | None = None) -> list[TensorData]:
    """The tensors of a model as ggml types, in the order of `types`; the same for the same shape, seed and types.

    Args:
        types: tensor -> ggml type.
        blocks: draw matrices from a store of so many blocks instead of making every weight (see `BlockStore`). A matrix whose rows are
        no multiple of these blocks is made as usual.
    """
    store = BlockStore(blocks, seed, convert) if blocks is not None else None
    tensors: dict[str, TensorData] = {}
    for index, (name, dims) in enumerate(tensors_of(shape)):
        if store is not None and len(dims) == 2 and dims[1] % SIZE == 0:
            tensors[name] = store.tensor(types[name], _scale(name, dims, shape), prod(dims), [seed, index])
        else:
            tensors[name] = converted(prod(dims), types[name], partial(_values, name, dims, shape, [seed, index]), convert)
    return [tensors[name] for name in types]


def at_once(shape: Shape, blocks: int | None) -> int:
    """The most elements that are held at once: portions of a matrix, or a store's blocks, in float32 and as they are stored."""
    largest = max((prod(dims) for _, dims in tensors_of(shape)), default=0)
    return max(min(PORTION, largest) * ahead(), 2 * SIZE * (blocks or 0))


def check_size(out: Path, size: int, tokens: int, largest: int = PORTION) -> None:
    """Refuse a model that the disk or the memory cannot hold while it is made.

    Args:
        size: bytes of its tensors in the file.
        tokens: entries of its tokenizer, whose texts are Python objects while they are written.
        largest: elements that are held at once.

    Raises:
        InputError: there is too little disk space or memory.
    """
    require_room(out, size, _BYTES_AN_ELEMENT * largest + _BYTES_A_TOKEN * tokens)


def _type(name: str) -> Any:
    import gguf

    possible = {kind.name.lower(): kind for kind in (gguf.GGMLQuantizationType.F32, *_quantizable())}
    if name.lower() not in possible:
        raise InputError(f"gguf cannot make weights of type {name!r}.", f"Use one of {', '.join(possible)}.", code="type")
    return possible[name.lower()]


def _quantizable() -> tuple[Any, ...]:
    from gguf import GGMLQuantizationType as Kind

    return (Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)


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
