"""A recipe: the metadata with which llama.cpp builds a small model of an architecture.
llama.cpp itself names the tensors that it wants for these metadata, with their shapes; a recipe only names the optional ones that the
model leaves out.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.errors import InputError
from checkpoints.given_json import decoded

from .shape import MOST_LAYERS, Shape

Value = bool | int | float | str | list[Any]
Tensor = tuple[str, tuple[int, ...]]
_QUANTISATION_SCALE = r"\.(scale|input_scale)$"  # of NVFP4 weights: scalars beside a matrix, which no plain file has


class Recipe(Struct, frozen=True):
    """How to make one kind of model.

    Attributes:
        name: what `--architecture` takes: the architecture, or a variant of it.
        architecture: the file's `general.architecture`.
        shape: the default dimensions.
        metadata: values by key, without the architecture's prefix, or with a leading "/" for whole keys; a value may be a
            function of the shape.
        without: regular expressions of optional tensors that the model lacks.
        layer_norm: whether norms are LayerNorm (ε under its own key) instead of RMS.
        fused_qkv: whether Q, K and V lie in one tensor.
        qk_norm: the centre of the weights of norms of queries and keys; small where scores are not scaled by 1/√d.
        kind: the default file type.
    """

    name: str
    architecture: str
    shape: Shape
    metadata: Mapping[str, Value | Callable[[Shape], Value]]
    without: tuple[str, ...] = ()
    layer_norm: bool = False
    fused_qkv: bool = False
    qk_norm: float = 1.0
    kind: str = "f16"

    def values(self, shape: Shape, changes: Mapping[str, Value]) -> dict[str, Value]:
        """Every key of the architecture with its value, whole keys; `changes` replace and add."""
        epsilon = "attention.layer_norm_epsilon" if self.layer_norm else "attention.layer_norm_rms_epsilon"
        common: dict[str, Value] = {
            "context_length": shape.context,
            "embedding_length": shape.width,
            "block_count": shape.layers,
            "feed_forward_length": shape.ff,
            "attention.head_count": shape.heads,
            "attention.head_count_kv": shape.kv_heads,
            epsilon: shape.eps,
            "rope.freq_base": shape.rope_base,
            "vocab_size": shape.vocab,
        }
        if shape.head_size:
            common |= {"attention.key_length": shape.head, "attention.value_length": shape.head}
        own = {key: value(shape) if callable(value) else value for key, value in self.metadata.items()}
        return {self._whole(key): value for key, value in (common | own | dict(changes)).items()}

    def _whole(self, key: str) -> str:
        return key.removeprefix("/") if key.startswith("/") else f"{self.architecture}.{key}"

    def tensors(self, wanted: Iterable[Tensor], *, tied: bool) -> list[Tensor]:
        """Those of the wanted tensors (names and row-major shapes) that the file holds, Q, K and V fused if the recipe says so."""
        left_out = [re.compile(pattern) for pattern in (*self.without, _QUANTISATION_SCALE)]
        if tied:
            left_out.append(re.compile(r"^output\.weight$"))
        kept = [(name, dims) for name, dims in wanted if not any(pattern.search(name) for pattern in left_out)]
        return _fuse(kept) if self.fused_qkv else kept


def _fuse(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors with Q, K and V of each layer as one, in the place of Q."""
    shapes = dict(tensors)
    fused: list[Tensor] = []
    for name, dims in tensors:
        if ".attn_q." in name:
            parts = [shapes[name.replace(".attn_q.", f".attn_{letter}.")] for letter in "qkv"]
            fused.append((name.replace(".attn_q.", ".attn_qkv."), (sum(part[0] for part in parts), *dims[1:])))
        elif ".attn_k." not in name and ".attn_v." not in name:
            fused.append((name, dims))
    return fused


def shape_of(recipe: Recipe, **changes: Any) -> Shape:
    """The recipe's shape with the given fields changed; a field of None stays unchanged.

    If the recipe has as many key/value heads as query heads, a changed number of query heads changes both.

    Raises:
        InputError: a shape that no model can have.
    """
    chosen = {name: value for name, value in changes.items() if value is not None}
    if "heads" in chosen and recipe.shape.kv_heads == recipe.shape.heads:
        chosen.setdefault("kv_heads", chosen["heads"])
    shape = replace(recipe.shape, **chosen)
    if shape.layers > MOST_LAYERS:
        raise InputError(f"llama.cpp runs at most {MOST_LAYERS} layers.", "Change the shape.", code="shape")
    if shape.heads and not shape.head_size and shape.width % shape.heads:
        raise InputError(
            f"a width of {shape.width} is not a multiple of {shape.heads} heads.",
            "Change the shape, or give --head-size.",
            code="shape",
        )
    if shape.kv_heads and shape.heads % shape.kv_heads:
        raise InputError(
            f"{shape.heads} heads cannot share {shape.kv_heads} key/value heads evenly.", "Change the shape.", code="shape"
        )
    return shape


def parse_settings(settings: Iterable[str]) -> dict[str, Value]:
    """`KEY=VALUE` texts as metadata: true and false, whole numbers, numbers with a point or exponent, [lists], else text.

    Raises:
        InputError: a text without "=", or a malformed list.
    """
    parsed: dict[str, Value] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not key or not equals:
            raise InputError(f"--set {setting!r} has no value.", "Write e.g. --set attention.sliding_window=16.", code="set")
        parsed[key] = _value(text)
    return parsed


def _value(text: str) -> Value:
    try:
        value = decoded(text)
    except ValueError:
        return text
    if isinstance(value, list) and value and all(isinstance(item, bool | int | float | str) for item in value):
        return value
    if isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"{text} is not a metadata value.", "Use a number, true, false, a text, or a list of them.", code="set")
