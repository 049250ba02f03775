"""Decode steps of the fast mode: one kernel computes a whole step and makes its records."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.errors import ModelError
from checkpoints.points import in_layer, parse

from .. import ops
from ..backend import Array, Backend
from ..capture.device import DeviceStage
from ..capture.staged import CACHED, CAUSAL, LAST, PART_DOUBLES, PLAIN, StagedRows
from ..device import kernel, launch_behind
from ..weights.packing import BF16, F16, F32
from .weights import FastWeights

_THREADS = 512 + 64  # as in step.cuh: the threads that compute, and the warps that prefetch weights and record
_SQUARES = 8 * 512  # bytes of a norm's squares, where at other times heads are mixed
_OTHER = 3840  # bytes of Shared besides activations, heads and weights: pointers of two layers, sums, barriers
_FLOATS = 1 << F32 | 1 << F16 | 1 << BF16  # types whose rows have a piece for each of 128 lanes
# The matrices of a phase, whose types it is compiled for.
_PHASES = {
    "QKV_TYPES": ("attn_q", "attn_k", "attn_v"), "OUT_TYPES": ("attn_output",),
    "GATE_TYPES": ("ffn_gate", "ffn_up"), "DOWN_TYPES": ("ffn_down",),
}  # fmt: skip
# For quantised rows: those of a 0.5 B model are 56 pieces, those of the down projection 304 (step.cuh, messages.cuh say what these are).
_QUANTISED = {"DOWN_WARPS": 2, "FIRST_PAUSE": 500, "PAUSE": 100}
_ALIGNED = 64  # floats, as CuPy aligns what it allocates by itself
# Bytes of a piece of weights, and cycles to the next, on a device whose memory gives fewer bytes per second than that; near.cuh has
# those of faster ones. Measured (docs/benchmarks-log.md): an H100 (3.35 TB/s) takes 0.426 ms a step in F16 at 225 and 240, 0.434 at
# 255 and 0.447 at 270.
_SLOWER_MEMORY, _SLOWER_PACE = 4e12, {"PIECE": 2048, "PACE": 225, "LATER": 0}
_MEMORY_CLOCK, _BUS_WIDTH = 36, 37  # cudaDevAttrMemoryClockRate (kHz), cudaDevAttrGlobalMemoryBusWidth (bits)
# Elements that a warp records at a time: the smallest number with which no block has two chunks, or the largest.
_CHUNKS = (128, 256, 512, 1024)
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# What a layer leaves behind, in the order of decode.cu's `Layer`, and its number of floats in the letters of `_sizes`.
_OUTPUTS = {
    "attn_norm": "D", "q": "Q", "k": "K", "v": "K", "q_rope": "Q", "k_read": "KP", "v_read": "KP", "kq": "HP", "peaks": "2H",
    "kqv_out": "Q", "attn_out": "D", "ffn_inp": "D", "ffn_norm": "D", "ffn_gate": "F", "ffn_up": "F", "ffn_swiglu": "F",
    "ffn_out": "D", "l_out": "D",
}  # fmt: skip


def _places(xp: Any, layers: int, sizes: dict[str, int]) -> list[dict[str, Array]]:
    """Zeroed memory for every value of every layer, cut from one allocation: hundreds of them took 8 ms."""
    ends = np.cumsum([-(-size // _ALIGNED) * _ALIGNED for size in sizes.values()])
    everything = xp.zeros((layers, int(ends[-1])), np.float32)
    starts = dict(zip(sizes, (0, *ends[:-1].tolist()), strict=True))
    return [{name: layer[starts[name] : starts[name] + size] for name, size in sizes.items()} for layer in everything]


class _Wanted(Struct, frozen=True):
    """What a step records: the kernel's arguments but for the records' address, and the parts that the tap is told of.

    `places` is the room that they take, in records: the logits' sums by blocks follow their record.
    """

    arguments: tuple[Any, ...]
    parts: tuple[StagedRows, ...]
    places: int


class DecodeStep:
    """The device's memory of one sequence and the kernel that advances it by one token.

    `positions` are the places of the cache; the state (token, position) lives on the device, so that steps follow each
    other without the host.
    """

    def __init__(self, weights: FastWeights, backend: Backend, stream: Any, positions: int) -> None:
        xp, hp = backend.xp, weights.hp
        self._xp, self._stream, self._hp = xp, stream, hp
        self.weights = weights
        self.positions = positions
        self._device = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
        self.blocks: int = self._device["multiProcessorCount"]
        self.splits = max(1, self.blocks // hp.n_heads)
        q, k = hp.n_heads * hp.head_size, hp.n_kv_heads * hp.head_size
        sizes = {
            "D": hp.n_embd, "Q": q, "K": k, "KP": k * positions, "HP": hp.n_heads * positions, "2H": 2 * hp.n_heads, "F": hp.n_ff,
        }  # fmt: skip
        self.values = _places(xp, hp.n_layers, {name: sizes[size] for name, size in _OUTPUTS.items()})
        self.embd, self.output_norm = xp.zeros(hp.n_embd, np.float32), xp.zeros(hp.n_embd, np.float32)
        self.logits = xp.zeros(hp.n_vocab, np.float32)
        self.state = xp.zeros(4, dtype=np.int32)
        self.tokens = xp.zeros(positions + 1, dtype=np.int32)
        self.cosine = xp.zeros((positions, max(1, hp.rope_dims // 2)), np.float32)
        self.sine = xp.zeros_like(self.cosine)
        self._best = xp.zeros(self.blocks * 2, np.uint64)
        self._words = xp.zeros(
            (hp.n_layers, q + 2 * k + 2 * hp.n_embd + hp.n_ff + hp.n_heads * self.splits * (2 + hp.head_size)), np.uint64
        )
        self._settled = xp.zeros(1, dtype=np.uint32)
        self._model = self._describe()
        defines = self._defines()
        self._kernel = kernel("decode", "decode", defines)
        self._place_token = kernel("decode", "place_token", defines)
        self._place_best = kernel("decode", "place_best", defines)
        size = xp.zeros(1, dtype=np.int32)
        kernel("decode", "shared_bytes", defines)((1,), (1,), (size,))
        self._shared = int(size[0])  # bytes of the structure, the staged weights included
        if self._shared > self._device["sharedMemPerBlockOptin"]:
            raise ModelError(
                f"the fast mode needs {self._shared:,} bytes of shared memory for this model, and a block of this device has"
                f" {self._device['sharedMemPerBlockOptin']:,}.", "Use --mode exact.", code="fast-mode",
            )  # fmt: skip
        if self._shared > 48 * 1024:
            self._kernel.max_dynamic_shared_size_bytes = self._shared
        self._wanted: dict[tuple[frozenset[str], int], _Wanted] = {}
        self._first: int | None = None  # the position that the angles start at
        self.set_angles(0)

    def _defines(self) -> tuple[str, ...]:
        hp = self._hp
        numbers = {
            "LAYERS": hp.n_layers, "D": hp.n_embd, "HEADS": hp.n_heads, "KV_HEADS": hp.n_kv_heads, "HEAD": hp.head_size,
            "FF": hp.n_ff, "VOCAB": hp.n_vocab, "ROPE": hp.rope_dims, "NEOX": int(self.weights.neox), "POSITIONS": self.positions,
            "BLOCKS": self.blocks, "SPLITS": self.splits,
        }  # fmt: skip
        numbers |= self._staging()
        if self._memory_bandwidth() < _SLOWER_MEMORY:
            numbers |= _SLOWER_PACE
        if not self.weights.types & _FLOATS:
            numbers |= _QUANTISED
        masks = {"TYPES": self.weights.types, "LOGIT_TYPES": 1 << self.weights.output.kind}
        masks |= {phase: self.weights.types_of(*names) for phase, names in _PHASES.items()}
        return (*(f"{name}={value}" for name, value in numbers.items()), *(f"{name}={mask}ull" for name, mask in masks.items()))

    def _memory_bandwidth(self) -> float:
        """Peak bytes per second of the device's memory: two transfers a clock over the bus's width."""
        runtime = self._xp.cuda.runtime
        clock, width = (runtime.deviceGetAttribute(number, self._xp.cuda.Device().id) for number in (_MEMORY_CLOCK, _BUS_WIDTH))
        return 2.0 * int(clock) * 1000 * int(width) / 8

    def _staging(self) -> dict[str, int]:
        """Bytes of shared memory for a block's rows of gate and up, and of down; empty if they do not all fit."""
        hp, layers = self._hp, self.weights.layers

        def most(name: str, rows: int) -> int:
            share = rows // self.blocks + 1
            return max(layer.matrices[name].bytes_of(share) for layer in layers)

        gate, down = most("ffn_gate", hp.n_ff) + most("ffn_up", hp.n_ff), most("ffn_down", hp.n_embd)
        activations = max(hp.n_ff, hp.n_embd, hp.n_heads * hp.head_size)
        floats, others = self.weights.types & _FLOATS, self.weights.types & ~_FLOATS
        rest = (
            (4 * (9 * activations // 8 + 32) if floats else 0)
            + (4 * activations if others else 0)
            + max(64 * hp.head_size, _SQUARES)
            + _OTHER
        )
        fits = gate + down + rest <= self._device["sharedMemPerBlockOptin"]
        return {"GATE_BYTES": gate, "DOWN_BYTES": down} if fits else {"GATE_BYTES": 0, "DOWN_BYTES": 0}

    def _describe(self) -> list[Array]:
        """The kernel's `Model` and `Layer` structures, as 64-bit words in the order of their fields."""
        xp, w = self._xp, self.weights
        layers: list[int] = []
        for layer, values, words in zip(w.layers, self.values, self._words, strict=True):
            for name in _MATRICES:
                layers += layer.matrices[name].words()
            layers += [layer.attn_norm.data.ptr, layer.ffn_norm.data.ptr, *(value.data.ptr for value in values.values())]
            layers.append(words.data.ptr)
        there = xp.asarray(np.array(layers, dtype=np.int64))
        arrays = (
            self.embd,
            self.output_norm,
            self.logits,
            self._best,
            self.state,
            self.tokens,
            self._settled,
        )
        words = [
            there.data.ptr,
            *w.embedding.words(),
            *w.output.words(),
            w.norm.data.ptr,
            self.cosine.data.ptr,
            self.sine.data.ptr,
        ]
        return [there, xp.asarray(np.array([*words, *(array.data.ptr for array in arrays)], dtype=np.int64))]

    def set_angles(self, first: int) -> None:
        """Compute RoPE's angles, with position `first` at place 0 of the cache."""
        hp = self._hp
        if not hp.rope_dims or first == self._first:
            return
        self._first = first
        where = np.arange(self.positions) + first
        factors = self.weights.factors
        cosine, sine = ops.rope_angles(where, hp.rope_dims, base=hp.rope_base, scale=hp.rope_scale, factors=factors)
        self.cosine.set(cosine)
        self.sine.set(sine)

    def place_token(self, token: int, position: int) -> None:
        """Let the next step take this token, at this place."""
        self._place_token((1,), (1,), (self.state, np.int32(token), np.int32(position)))

    def place_best(self, logits: Array, position: int) -> None:
        """Let the next step take the largest of these logits [V], chosen on the device, at this place."""
        self._place_best((1,), (1024,), (self.state, logits, np.int32(position), self.tokens))

    def launch(self, stage: DeviceStage | None) -> None:
        """Launch one step, with the records that the tap wants, and do not wait for it."""
        names = frozenset() if stage is None else stage.points
        size = 0 if stage is None else stage.slice_size
        if (names, size) not in self._wanted:
            self._wanted[names, size] = self._records([name for name in self.points if name in names], stage)
        wanted, hp = self._wanted[names, size], self._hp
        records = stage.staging(wanted.places) if stage is not None and wanted.parts else np.uint64(0)
        step = (self._model[1], np.float32(hp.eps), np.float32(hp.head_size**-0.5), *wanted.arguments, records)
        launch_behind(self._kernel, self.blocks, _THREADS, step, self._shared)
        if stage is not None and wanted.parts:
            stage.staged(wanted.parts)

    @property
    def points(self) -> list[str]:
        """Every point of a decode step, in dataflow order."""
        kinds = [name for name in _OUTPUTS if name != "peaks"]
        kinds.insert(kinds.index("q_rope") + 1, "k_rope")
        kinds.insert(kinds.index("kq") + 1, "kq_soft_max")
        return ["embd", *(in_layer(i, kind) for i in range(self._hp.n_layers) for kind in kinds), "output_norm", "logits"]

    def _records(self, points: Sequence[str], stage: DeviceStage | None) -> _Wanted:
        """A table with a line for each chunk that a point may have, except the logits, whose parts each block sums up itself."""
        xp = self._xp
        work: list[tuple[int, ...]] = []
        parts: list[StagedRows] = []
        scale = int(np.float64(self._hp.head_size**-0.5).view(np.int64))
        described = [self._point(name, i) for i, name in enumerate(points)]
        longest = [most for part, _, _, most in described if not part.blocks]
        chunk = next((size for size in _CHUNKS if sum(-(-most // size) for most in longest) <= self.blocks), _CHUNKS[-1])
        for i, (part, base, peaks, most) in enumerate(described):
            point = (base, peaks, part.kind, part.width, part.heads, self.positions, len(work), scale, i)
            if not part.blocks:
                work += [(*point, c) for c in range(-(-most // chunk))]
            parts.append(replace(part, kind=PLAIN) if part.kind == LAST else part)
        table = xp.asarray(np.array(work, dtype=np.int64).reshape(-1))
        chunks = xp.empty(max(1, len(work)) * PART_DOUBLES, dtype=np.float64)
        counters = xp.zeros(max(1, len(points)), dtype=np.uint32)
        slice_size, size = (0, 1) if stage is None else (stage.slice_size, stage.record_bytes)
        logits = points.index("logits") if "logits" in points else -1
        places = len(points) + (-(-8 * PART_DOUBLES * self.blocks // size) if logits >= 0 else 0)
        numbers = tuple(np.int32(number) for number in (len(work), chunk, slice_size, size, logits))
        return _Wanted((table, *numbers, chunks, counters), tuple(parts), places)

    def _point(self, name: str, index: int) -> tuple[StagedRows, int, int, int]:
        """A point's layout, the addresses of its values and of softmax's peaks, and the most elements it can have."""
        hp, point = self._hp, parse(name)
        if point.layer is None:
            array = {"embd": self.embd, "output_norm": self.output_norm, "logits": self.logits}[name]
            blocks = self.blocks if name == "logits" else 0
            return StagedRows(name, PLAIN, index, array.size, 1, blocks), array.data.ptr, 0, array.size
        values, kind = self.values[point.layer], point.kind
        width = hp.n_kv_heads * hp.head_size
        if kind in ("k_read", "v_read"):
            return StagedRows(name, CACHED, index, width, 1), values[kind].data.ptr, 0, width * self.positions
        if kind == "k_rope":
            return StagedRows(name, LAST, index, width, 1), values["k_read"].data.ptr, 0, width
        if kind in ("kq", "kq_soft_max"):
            peaks = values["peaks"].data.ptr if kind == "kq_soft_max" else 0
            return StagedRows(name, CAUSAL, index, 0, hp.n_heads), values["kq"].data.ptr, peaks, hp.n_heads * self.positions
        return StagedRows(name, PLAIN, index, values[kind].size, 1), values[kind].data.ptr, 0, values[kind].size

    def chosen(self, start: int, stop: int) -> NDArray[np.int32]:
        """The tokens chosen for positions start…stop; waits for the steps."""
        self._stream.synchronize()
        tokens: NDArray[np.int32] = self._xp.asnumpy(self.tokens[start:stop])
        return tokens
