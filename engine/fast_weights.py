"""A model's weights on the device in the file's own types, and the shape that the fast mode's kernels are compiled for."""

from dataclasses import dataclass

import numpy as np

from checkpoints.errors import ModelError

from .backend import Array, Backend
from .blocks import ROPE_FACTORS
from .gguf_model import GgufModel, Hyperparameters
from .packing import F16, F32, PACKED, Packed, pack

PAIRS = {"qwen2": True, "llama": False}  # NEOX pairs, by architecture, as in engine/models


@dataclass(frozen=True)
class LayerWeights:
    """One layer: seven matrices with their biases, two norms."""

    matrices: dict[str, Packed]
    attn_norm: Array
    ffn_norm: Array


class FastWeights:
    """Every weight on the device; types that have no kernel are dequantised on the host and kept as float32.

    Raises:
        ModelError: an architecture or a shape that the fast mode does not have.
    """

    def __init__(self, model: GgufModel, backend: Backend) -> None:
        hp = model.hyperparameters
        _check(hp, model)
        self._model = model
        self._backend = backend
        self.hp = hp
        self.neox = PAIRS[hp.architecture]
        self.embedding = self._matrix("token_embd")
        self.output = self._matrix("output") if "output.weight" in model.tensors else self.embedding
        self.norm = self._vector("output_norm.weight")
        self.factors = backend.to_host(self._vector(ROPE_FACTORS)) if ROPE_FACTORS in model.tensors else None
        self.layers = [self._layer(f"blk.{i}") for i in range(hp.n_layers)]

    @property
    def types(self) -> int:
        """The ggml types of all matrices, as a bit mask."""
        kinds = {m.kind for layer in self.layers for m in layer.matrices.values()} | {self.embedding.kind, self.output.kind}
        return sum(1 << kind for kind in kinds)

    def _layer(self, name: str) -> LayerWeights:
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        matrices = {part: self._matrix(f"{name}.{part}") for part in names}
        return LayerWeights(matrices, self._vector(f"{name}.attn_norm.weight"), self._vector(f"{name}.ffn_norm.weight"))

    def _vector(self, name: str) -> Array:
        return self._backend.array(self._model.load(name).ravel())

    def _matrix(self, name: str) -> Packed:
        info = self._model.tensors[f"{name}.weight"]
        bias = self._vector(f"{name}.bias") if f"{name}.bias" in self._model.tensors else None
        cols = info.shape[-1]
        kind = info.type if info.type in PACKED else F32
        host = self._model.raw(f"{name}.weight") if kind == info.type else self._model.load(f"{name}.weight").view(np.uint8)
        if kind == F16:  # rows of halves need no other place
            return Packed(kind, host.shape[0], cols, self._backend.array(host), bias=bias)
        packed = pack(self._backend.array(host), kind, cols)
        return Packed(kind, packed.rows, cols, packed.low, packed.high, packed.scales, packed.super, bias)


def _check(hp: Hyperparameters, model: GgufModel) -> None:
    wrong = {
        f"no architecture {hp.architecture!r}, only {', '.join(PAIRS)}": hp.architecture not in PAIRS,
        "no mixture of experts": "blk.0.ffn_gate_inp.weight" in model.tensors,
        f"no value heads of {hp.value_size} beside key heads of {hp.head_size}": hp.value_size != hp.head_size,
        "no widths that are no multiple of 32": bool(hp.n_embd % 32 or hp.n_ff % 32 or hp.n_heads * hp.head_size % 32),
    }
    for reason, broken in wrong.items():
        if broken:
            raise ModelError(f"the fast mode has {reason}.", "Take --mode exact.", code="fast-mode")
