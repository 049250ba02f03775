"""The fast mode: native weight types on the device, prefill through cuBLAS, decode as one graph. CuPy only.

The plain operations of `engine.ops` stay the definition; tests hold this mode to them. A prefill's products round
activations (and quantised weights) to half precision, or to bfloat16 for BF16 files; decode rounds nothing but sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import InputError
from checkpoints.points import in_layer
from checkpoints.record import Token

from .backend import Array, Backend
from .capture import Capture, Pass
from .capture_gpu import DeviceCapture
from .device import kernel
from .fast_decode import DecodeStep
from .fast_weights import FastWeights
from .gguf_model import GgufModel
from .packing import BF16, F16, F32, Packed
from .transformer import Transformer

_POSITIONS = 2048  # places of the cache if nothing else is said
_R_32F, _R_16F, _R_16BF, _COMPUTE_32F = 0, 2, 14, 68  # cudaDataType_t, cublasComputeType_t
_DEFAULT_ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT


@dataclass
class FastProgress:
    """The sequence in progress; a model has one at a time, since its cache is part of the graphs."""

    first: int
    length: int = 0
    passes: int = 0


class FastTransformer(Transformer):
    """Runs a model in its own types; same interface as `Transformer`, one sequence at a time.

    Raises:
        ModelError: the model has an architecture, shape or bias that this mode does not have.
    """

    def __init__(self, model: GgufModel, backend: Backend, *, positions: int = _POSITIONS) -> None:
        super().__init__(model, backend, resident=False)
        xp = backend.xp
        self._xp = xp
        self.stream = xp.cuda.Stream(non_blocking=True)
        with self.stream:
            self._weights = FastWeights(model, backend)
            self.step = DecodeStep(self._weights, backend, self.stream, min(positions, self.hp.n_ctx_train))
        self.stream.synchronize()
        self._bf16 = bool(self._weights.types >> BF16 & 1)
        self._low = np.dtype(np.float16)  # bfloat16 has the same size: CuPy needs no type of it
        self._defines = (f"TYPES={self._weights.types}ull", "LOW=__nv_bfloat16" if self._bf16 else "LOW=__half")
        self._one, self._zero = np.array(1, np.float32), np.array(0, np.float32)

    @property
    def compute(self) -> str:
        """The arithmetic of a prefill, for the dump's header."""
        return "bf16" if self._bf16 else "f16"

    def start(self, first_position: int = 0) -> Any:
        """A new, empty sequence; it takes the place of the last."""
        with self.stream:
            self.step.set_angles(first_position)
        return FastProgress(first_position)

    def forward(self, tokens: Sequence[int], sequence: Any, tap: Capture | None = None) -> NDArray[np.float32]:
        """One pass over the next tokens: [T] -> logits of the last position [V], on the host.

        Raises:
            InputError: tokens that the model or the cache cannot take.
        """
        self.check(tokens, sequence.first + sequence.length)
        self._fits(sequence.length + len(tokens))
        with self.stream:
            if len(tokens) == 1 and sequence.length:
                self.step.place_token(int(tokens[0]))
                self._decode(sequence, tap)
                made = self.step.logits
            else:
                made = self._prefill(tokens, sequence, tap)[-1]
            return np.asarray(self._xp.asnumpy(made))

    def generate(self, count: int, sequence: Any, tap: Capture | None = None) -> NDArray[np.int32]:
        """`count` greedy steps after a prefill, chosen on the device: the ids of the tokens that were chosen [count + 1].

        The first is the prefill's own choice. Nothing waits for the device until all steps are launched.
        """
        self._fits(sequence.length + count)
        start = sequence.length
        with self.stream:
            for _ in range(count):
                self._decode(sequence, tap)
        return self.step.chosen(start, start + count + 1)

    def _fits(self, length: int) -> None:
        if length > self.step.positions:
            raise InputError(
                f"{length:,} positions are more than the fast mode's cache of {self.step.positions:,}.", code="context"
            )

    def _decode(self, sequence: Any, tap: Capture | None) -> None:
        """Launch one step; the token stands in the device's state."""
        if tap is not None:
            tap.begin(Pass(np.array([sequence.first + sequence.length]), sequence.passes, decode=True, first=sequence.first))
        self.step.launch(tap if isinstance(tap, DeviceCapture) and tap.keeps_rows else None)
        if tap is not None and not isinstance(tap, DeviceCapture):
            raise TypeError("the fast mode's steps are recorded by engine.capture_gpu.DeviceCapture")
        sequence.length += 1
        sequence.passes += 1

    def _prefill(self, tokens: Sequence[int], sequence: Any, tap: Capture | None) -> Array:
        """Logits of all rows [T, V]: the same products whatever is captured."""
        xp, hp, w, step = self._xp, self.hp, self._weights, self.step
        past, t = sequence.length, len(tokens)
        s = past + t
        positions = np.arange(t) + sequence.first + past
        if tap is not None:
            tap.begin(Pass(positions, sequence.passes, decode=sequence.passes > 0, first=sequence.first))
        keep = tap or (lambda _name, _value: None)

        def floats(*shape: int) -> Array:
            return xp.empty(shape, dtype=np.float32)

        width, q_width, k_width = hp.n_embd, hp.n_heads * hp.head_size, hp.n_kv_heads * hp.head_size
        x = floats(t, width)
        ids = xp.asarray(np.asarray(tokens, dtype=np.int32))
        self._run("get_rows", t, (_struct(w.embedding), ids, np.int32(width), x))
        keep("embd", x)
        scores, shares = floats(hp.n_heads, t, s), floats(hp.n_heads, t, s)
        normed, low, low_q, low_f = floats(t, width), self._lows(t, width), self._lows(t, q_width), self._lows(t, hp.n_ff)
        made, bias = x, None
        for i, (layer, held) in enumerate(zip(w.layers, step.values, strict=True)):

            def at(kind: str, i: int = i) -> str:
                return in_layer(i, kind)

            m = layer.matrices
            if i == 0:
                self._norm(x, None, None, x, layer.attn_norm, normed, low)
            else:
                after = floats(t, width)
                self._norm(made, bias, x, after, layer.attn_norm, normed, low)
                keep(in_layer(i - 1, "ffn_out"), made)
                keep(in_layer(i - 1, "l_out"), after)
                x = after
            keep(at("attn_norm"), normed)
            k_all, v_all = (held[name].reshape(-1, k_width) for name in ("k_read", "v_read"))
            q, q_rope = self._product(low, normed, m["attn_q"]), floats(t, q_width)
            k, v = self._product(low, normed, m["attn_k"]), self._product(low, normed, m["attn_v"], bias=True)
            self._rope(q, m["attn_q"].bias, past, hp.n_heads, q_rope)
            self._rope(k, m["attn_k"].bias, past, hp.n_kv_heads, k_all[past:])
            v_all[past:s] = v
            for name, value in (("q", q), ("k", k), ("v", v), ("q_rope", q_rope), ("k_rope", k_all[past:s])):
                keep(at(name), value)
            keep(at("k_read"), k_all[:s])
            keep(at("v_read"), v_all[:s])
            mixed = floats(t, q_width)
            self._attend(q_rope, k_all, v_all, scores, shares, mixed, past)
            keep(at("kq"), scores)
            keep(at("kq_soft_max"), shares)
            keep(at("kqv_out"), mixed)
            self._run("lower", 256, (mixed, np.int64(mixed.size), low_q))
            out, inp = self._product(low_q, mixed, m["attn_output"]), floats(t, width)
            self._norm(out, m["attn_output"].bias, x, inp, layer.ffn_norm, normed, low)
            keep(at("attn_out"), out)
            keep(at("ffn_inp"), inp)
            keep(at("ffn_norm"), normed)
            gate = self._product(low, normed, m["ffn_gate"], bias=True)
            up, swiglu = self._product(low, normed, m["ffn_up"], bias=True), floats(t, hp.n_ff)
            self._run("swiglu", 1024, (gate, up, np.int64(gate.size), swiglu, low_f))
            for name, value in (("ffn_gate", gate), ("ffn_up", up), ("ffn_swiglu", swiglu)):
                keep(at(name), value)
            made, bias, x = self._product(low_f, swiglu, m["ffn_down"]), m["ffn_down"].bias, inp
        after = floats(t, width)
        self._norm(made, bias, x, after, w.norm, normed, low)
        keep(in_layer(hp.n_layers - 1, "ffn_out"), made)
        keep(in_layer(hp.n_layers - 1, "l_out"), after)
        keep("output_norm", normed)
        logits = self._product(low, normed, w.output, bias=True)
        keep("logits", logits)
        sequence.length, sequence.passes = s, sequence.passes + 1
        step.place_best(logits[-1], s)
        return logits

    def _lows(self, *shape: int) -> Array:
        return self._xp.empty(shape, dtype=self._low)

    def _run(self, name: str, blocks: int, arguments: tuple[Any, ...], threads: int = 256, shared: int = 0) -> None:
        kernel("prefill", name, self._defines)((blocks,), (threads,), arguments, shared_mem=shared)

    def _norm(self, made: Array, bias: Array, residual: Array, total: Array, weight: Array, out: Array, low: Array) -> None:
        t, n = made.shape
        arguments = (made, _or_null(bias), _or_null(residual), total, weight, np.float32(self.hp.eps), np.int32(n), out, low)
        self._run("add_norm", t, arguments, shared=4 * n)

    def _rope(self, x: Array, bias: Array, past: int, heads: int, after: Array) -> None:
        hp = self.hp
        numbers = (
            np.int32(past),
            np.int32(heads),
            np.int32(hp.head_size),
            np.int32(hp.rope_dims),
            np.int32(self._weights.neox),
        )
        self._run("rope", len(x), (x, _or_null(bias), self.step.cosine, self.step.sine, *numbers, after))

    def _product(self, low: Array, wide: Array, matrix: Packed, *, bias: bool = False) -> Array:
        """x · Wᵀ: [T, in] -> float32 [T, out], accumulated in float32; `low` is x rounded to the product's type."""
        xp, t = self._xp, low.shape[0]
        out = xp.empty((t, matrix.rows), dtype=np.float32)
        x, weight, kind = low, matrix.low, _R_16BF if self._bf16 else _R_16F
        if matrix.kind == F32:
            x, kind = wide, _R_32F
        elif matrix.kind != (BF16 if self._bf16 else F16):
            weight = self._lows(matrix.rows, matrix.cols)
            self._run("unpack", matrix.rows, (_struct(matrix), np.int32(matrix.cols), weight))
        cublas = xp.cuda.cublas
        cublas.gemmEx(
            xp.cuda.device.get_cublas_handle(), cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, matrix.rows, t, matrix.cols,
            self._one.ctypes.data, weight.data.ptr, kind, matrix.cols, x.data.ptr, kind, matrix.cols,
            self._zero.ctypes.data, out.data.ptr, _R_32F, matrix.rows, _COMPUTE_32F, _DEFAULT_ALGORITHM,
        )  # fmt: skip
        if bias and matrix.bias is not None:
            self._run("add_bias", t, (out, matrix.bias, np.int32(matrix.rows)))
        return out

    def _attend(self, q: Array, k: Array, v: Array, scores: Array, shares: Array, out: Array, past: int) -> None:
        """Scores, softmax and weighted values of all heads, float32; the heads of a group share the product's K or V."""
        xp, hp = self._xp, self.hp
        heads, t, s = scores.shape
        d, q_width, k_width, group = hp.head_size, q.shape[1], k.shape[1], heads // hp.n_kv_heads
        cublas, handle = xp.cuda.cublas, xp.cuda.device.get_cublas_handle()
        one, zero, item = self._one.ctypes.data, self._zero.ctypes.data, 4
        for g in range(hp.n_kv_heads):
            cublas.sgemmStridedBatched(
                handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, s, t, d, one, k.data.ptr + g * d * item, k_width, 0,
                q.data.ptr + g * group * d * item, q_width, d, zero, scores.data.ptr + g * group * t * s * item, s, t * s, group,
            )  # fmt: skip
        numbers = (np.int32(t), np.int32(s), np.int32(past), np.float32(d**-0.5))
        self._run("soft_max", heads * t, (scores, *numbers, shares))
        for g in range(hp.n_kv_heads):
            cublas.sgemmStridedBatched(
                handle, cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_N, d, t, s, one, v.data.ptr + g * d * item, k_width, 0,
                shares.data.ptr + g * group * t * s * item, s, t * s, zero, out.data.ptr + g * group * d * item, q_width, d, group,
            )  # fmt: skip


def _struct(matrix: Packed) -> NDArray[Any]:
    """A `Matrix` of weights.cuh as a kernel's argument."""
    return np.array(tuple(matrix.words()), dtype=[(f"word{i}", "<i8") for i in range(6)])


def _or_null(array: Array) -> Any:
    return np.int64(0) if array is None else array


def records_of(tokens: NDArray[np.int32], first: int) -> list[Token]:
    """Token records of generated ids; the first stands at position `first`."""
    return [Token(first + i, int(token)) for i, token in enumerate(tokens)]
