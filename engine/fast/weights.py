"""A model's weights on the device in the file's own types, and the dimensions that the fast mode's kernels are compiled for."""

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.errors import ModelError

from ..backend import Array, Backend
from ..blocks import ROPE_FACTORS
from ..weights.gguf_model import GgufModel
from ..weights.packing import BF16, F16, F32, PACKED, Q4_0, Q5_0, Q8_0, Packed, pack, pack_as_bytes
from .upload import Upload

PAIRS = {"qwen2": True, "llama": False}  # NEOX pairs, by architecture, as in engine/models
_FLOATS = {F32, F16, BF16}
_LIKE_BYTES = {Q4_0, Q5_0, Q8_0}
_GROUPS = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))


class MatrixGroup(Struct, frozen=True):
    """Matrices that are multiplied in one product.

    `kind` is their ggml type if they share one float type and lie one after the other in `joined`, else -1: then they are
    unpacked first.
    """

    parts: tuple[Packed, ...]
    kind: int
    joined: Array


class LayerWeights(Struct, frozen=True):
    """One layer: seven matrices with their biases, by name and as the groups of a prefill's products; two norms."""

    matrices: dict[str, Packed]
    qkv: MatrixGroup
    out: MatrixGroup
    gate_up: MatrixGroup
    down: MatrixGroup
    attn_norm: Array
    ffn_norm: Array


class FastWeights:
    """Every weight on the device; types without a kernel are dequantised on the host and kept as float32.

    Matrices of float types are only complete when `upload` has ended.

    Raises:
        ModelError: the fast mode does not support this architecture or shape.
    """

    def __init__(self, model: GgufModel, backend: Backend, upload: Upload) -> None:
        hp = model.hyperparameters
        if reason := lacking(model):
            raise ModelError(f"the fast mode has {reason}.", "Use --mode exact.", code="fast-mode")
        # Packing needs several copies of a matrix's blocks: room for three of the largest, beside all the rest.
        sizes = [info.n_bytes for info in model.tensors.values()]
        backend.require(sum(sizes) + 3 * max(sizes), f"{model.path.name} in its own types")
        # One allocation from the driver, which CuPy's pool cuts up (in units of 512 bytes): separate ones took 40 ms.
        backend.xp.empty(sum(sizes) + 512 * len(sizes), np.uint8)
        self._model = model
        self._backend = backend
        self.hp = hp
        self.neox = PAIRS[hp.architecture]
        self._upload = upload
        self._vectors = self._all_vectors()
        embedding = self._group("token_embd")
        self.output_group = self._group("output") if "output.weight" in model.tensors else embedding
        self.embedding, self.output = embedding.parts[0], self.output_group.parts[0]
        self.norm = self._vectors["output_norm.weight"]
        self.factors = model.load(ROPE_FACTORS).ravel() if ROPE_FACTORS in model.tensors else None
        kinds = {model.tensors[f"blk.{i}.{name}.weight"].type for i in range(hp.n_layers) for name in _GROUPS[0]}
        # A phase of one type loads its first rows before their activations are there: Q, K and V, the smallest ones, are made alike.
        self._qkv_as_bytes = len(kinds) > 1 and kinds <= _LIKE_BYTES
        self.layers = [self._layer(f"blk.{i}.") for i in range(hp.n_layers)]

    @property
    def types(self) -> int:
        """The ggml types of all matrices, as a bit mask."""
        kinds = {m.kind for layer in self.layers for m in layer.matrices.values()} | {self.embedding.kind, self.output.kind}
        return sum(1 << kind for kind in kinds)

    def types_of(self, *names: str) -> int:
        """The ggml types of these matrices of all layers, as a bit mask."""
        return sum(1 << kind for kind in {layer.matrices[name].kind for layer in self.layers for name in names})

    def _layer(self, name: str) -> LayerWeights:
        qkv, out, gate_up, down = groups = [
            self._group(*(name + part for part in parts), as_bytes=self._qkv_as_bytes and parts is _GROUPS[0])
            for parts in _GROUPS
        ]
        names = [part for parts in _GROUPS for part in parts]
        matrices = dict(zip(names, [part for group in groups for part in group.parts], strict=True))
        norms = self._vectors[f"{name}attn_norm.weight"], self._vectors[f"{name}ffn_norm.weight"]
        return LayerWeights(matrices, qkv, out, gate_up, down, *norms)

    def _all_vectors(self) -> dict[str, Array]:
        """Norms and biases as float32, copied to the device together, as they are many and small."""
        hosts = {
            name: self._model.load(name).ravel() for name in self._model.tensors if name.endswith(("norm.weight", ".bias"))
        }
        together = self._backend.array(np.concatenate([*hosts.values()]))
        ends = np.cumsum([host.size for host in hosts.values()]).tolist()
        return {name: together[end - host.size : end] for (name, host), end in zip(hosts.items(), ends, strict=True)}

    def _group(self, *names: str, as_bytes: bool = False) -> MatrixGroup:
        """Matrices of one width: float types one after the other in memory, each quantised one as its own planes."""
        infos = [self._model.tensors[f"{name}.weight"] for name in names]
        kinds = {info.type for info in infos}
        if len(kinds) > 1 or not kinds <= _FLOATS:
            return MatrixGroup(tuple(self._packed(name, as_bytes) for name in names), -1, None)
        joined = self._backend.xp.empty((sum(info.shape[0] for info in infos), infos[0].n_bytes // infos[0].shape[0]), np.uint8)
        parts, done = [], 0
        for name, info in zip(names, infos, strict=True):
            rows = joined[done : done + info.shape[0]]
            self._upload.into(rows, info.offset)
            parts.append(Packed(info.type, info.shape[0], info.shape[1], rows, bias=self._bias(name)))
            done += info.shape[0]
        return MatrixGroup(tuple(parts), kinds.pop(), joined)

    def _packed(self, name: str, as_bytes: bool) -> Packed:
        info = self._model.tensors[f"{name}.weight"]
        kind, cols = (info.type if info.type in PACKED else F32), info.shape[-1]
        if kind == info.type:
            raw = self._backend.xp.empty((info.shape[0], info.n_bytes // info.shape[0]), np.uint8)
            self._upload.into(raw, info.offset)
            self._upload.wait()
        else:
            raw = self._backend.array(self._model.load(f"{name}.weight").view(np.uint8))
        return replace((pack_as_bytes if as_bytes else pack)(raw, kind, cols), bias=self._bias(name))

    def _bias(self, name: str) -> Array:
        return self._vectors.get(f"{name}.bias")


def lacking(model: GgufModel) -> str | None:
    """Why the fast mode cannot run a model; None if it can."""
    hp = model.hyperparameters
    wrong = {
        f"no architecture {hp.architecture!r}, only {', '.join(PAIRS)}": hp.architecture not in PAIRS,
        "no mixture of experts": "blk.0.ffn_gate_inp.weight" in model.tensors,
        f"no value heads of {hp.value_size} beside key heads of {hp.head_size}": hp.value_size != hp.head_size,
        "no models in several files": len(model.contents.parts) > 1,
        "no widths that are no multiple of 32": bool(hp.n_embd % 32 or hp.n_ff % 32 or hp.n_heads * hp.head_size % 32),
    }
    return next((reason for reason, broken in wrong.items() if broken), None)
