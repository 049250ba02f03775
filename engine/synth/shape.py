"""The shapes of models with random weights, and the tensors that llama.cpp wants for each: qwen2 and llama only."""

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.errors import InputError

MOST_LAYERS = 512  # LLAMA_MAX_LAYERS in llama.cpp's llama-hparams.h


class Shape(Struct, frozen=True):
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
        raise InputError(f"there is no shape {like!r}.", f"Use one of {', '.join(PRESETS)}.", code="shape")
    shape = replace(PRESETS[like], **{name: value for name, value in changes.items() if value is not None})
    if wrong := next(_wrong(shape), None):
        raise InputError(f"{wrong}.", "Change the shape.", code="shape")
    return shape


def _wrong(shape: Shape) -> Iterator[str]:
    """What no engine could run. Each check relies on those before it: nothing is divided by 0."""
    numbers = {name: getattr(shape, name) for name, kind in Shape.__annotations__.items() if kind is int}
    for name, value in numbers.items():
        if value >= 1 << 32:  # GGUF keeps these as uint32
            yield f"--{name.replace('_', '-')} is too large"
    for name, value in numbers.items():
        if value < (0 if name in ("head_size", "rope_dims") else 1):
            yield f"--{name.replace('_', '-')} is too small"
    if shape.layers > MOST_LAYERS:
        yield f"llama.cpp runs at most {MOST_LAYERS} layers"
    if shape.architecture not in ("qwen2", "llama"):
        yield "only qwen2 and llama are supported"
    if shape.heads % shape.kv_heads:
        yield f"{shape.heads} heads cannot share {shape.kv_heads} key/value heads evenly"
    if not shape.head_size and shape.width % shape.heads:
        yield f"a width of {shape.width} is not a multiple of {shape.heads} heads"
    if shape.architecture == "qwen2" and shape.head * shape.heads != shape.width:
        yield "llama.cpp's qwen2 has heads of width / heads only"
    if shape.head % 2:
        yield f"a head of {shape.head} cannot be rotated in pairs"
    if shape.rope_dims not in (0, shape.head):
        yield f"llama.cpp's {shape.architecture} rotates whole heads, not {shape.rope_dims} elements of {shape.head}"


def tensors_of(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
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


def matrices_of(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The matrices among them."""
    return ((name, dims) for name, dims in tensors_of(shape) if len(dims) == 2)
