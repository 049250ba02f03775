"""A prefill of the fast mode: cuBLAS's products, and kernels of our own between them.

Twelve launches a layer, into buffers that serve all layers: with more and smaller launches the host would be slower than the device.
The products are the same whatever is captured.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.points import in_layer

from ..backend import Array, Backend
from ..device import kernel
from ..weights.packing import BF16, F16, F32, Packed
from .decode import DecodeStep
from .weights import FastWeights, MatrixGroup

_R_32F, _R_16F, _R_16BF, _COMPUTE_32F = 0, 2, 14, 68  # cudaDataType_t, cublasComputeType_t
_DEFAULT_ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT
_KERNELS = ("get_rows", "unpack", "add_norm", "project", "soft_max", "lower", "add_bias", "swiglu")


Keep = Callable[[str, Array], None]


class _LayerArguments(Struct, frozen=True):
    """What stays the same in every pass of one layer: names of its points, biases of Q, K and V (or null), its caches."""

    names: list[str]
    biases: tuple[Any, ...]
    keys: Array
    values: Array

    def hand_over(self, keep: Keep, first: int, values: tuple[Array, ...]) -> None:
        """Pass the values of consecutive points to `keep`, from number `first` of `_POINTS` on."""
        for name, value in zip(self.names[first : first + len(values)], values, strict=True):
            keep(name, value)


class Prefill:
    """Passes over several tokens; one model's weights and cache."""

    def __init__(self, weights: FastWeights, step: DecodeStep, backend: Backend) -> None:
        self._xp, self._weights, self._step, self._hp = backend.xp, weights, step, weights.hp
        bf16 = bool(weights.types >> BF16 & 1)
        self._kind, self._type = (BF16, _R_16BF) if bf16 else (F16, _R_16F)
        defines = (f"TYPES={weights.types}ull", "LOW=__nv_bfloat16" if bf16 else "LOW=__half")
        self._kernels = {name: kernel("prefill", name, defines) for name in _KERNELS}
        self._cublas, self._handle = self._xp.cuda.cublas, self._xp.cuda.device.get_cublas_handle()
        self._constants = np.array([1, 0], np.float32)  # cuBLAS's α and β: a product, and nothing of what was there before
        self._float_one, self._float_zero = self._constants.ctypes.data, self._constants.ctypes.data + 4
        hp = self._hp
        self._head_numbers = tuple(
            np.int32(n) for n in (hp.n_heads, hp.n_kv_heads, hp.head_size, hp.rope_dims, int(weights.neox))
        )
        self._unpacked: Array = None
        width = hp.n_kv_heads * hp.head_size
        self._places = [
            _LayerArguments(
                [in_layer(i, kind) for kind in _POINTS],
                tuple(_or_null(layer.matrices[name].bias) for name in ("attn_q", "attn_k", "attn_v")),
                held["k_read"].reshape(-1, width),
                held["v_read"].reshape(-1, width),
            )
            for i, (layer, held) in enumerate(zip(weights.layers, step.values, strict=True))
        ]

    def run(self, tokens: NDArray[np.int32], past: int, keep: Keep | None) -> Array:
        """Logits of all rows, after `past` tokens in the cache: [T] -> [T, V]. `keep` is called with every value, in dataflow order."""
        hp, w, step = self._hp, self._weights, self._step
        t = len(tokens)
        s, width, q_width, k_width = past + t, hp.n_embd, hp.n_heads * hp.head_size, hp.n_kv_heads * hp.head_size
        x, normed, low, product = self._floats(t, width), self._floats(t, width), self._lows(t, width), self._floats(t, width)
        projected, q, k = self._floats(t, q_width + 2 * k_width), self._floats(t, q_width), self._floats(t, k_width)
        q_rope, mixed, low_q = self._floats(t, q_width), self._floats(t, q_width), self._lows(t, q_width)
        gates, swiglu, low_f = self._floats(2, t, hp.n_ff), self._floats(t, hp.n_ff), self._lows(t, hp.n_ff)
        scores, shares = self._floats(hp.n_heads, t, s), self._floats(hp.n_heads, t, s)
        pointers = self._pointers(q_rope, scores, shares, mixed)
        sizes = (np.int32(t), np.int32(s), np.int32(past), np.float32(hp.head_size**-0.5))
        self._run("get_rows", t, (_struct(w.embedding), self._xp.asarray(tokens), np.int32(width), x))
        if keep:
            keep("embd", x)
        self._norm(x, None, None, x, w.layers[0].attn_norm, normed, low)
        gate, up = gates[0], gates[1]
        for i, (layer, place) in enumerate(zip(w.layers, self._places, strict=True)):
            m = layer.matrices
            self._product(layer.qkv, low, normed, projected)
            angles = (step.cosine, step.sine, np.int32(past))
            caches = (place.keys, place.values)
            self._run("project", t, (projected, *place.biases, *angles, *self._head_numbers, q, k, q_rope, *caches))
            if keep:
                new_k, new_v, all_k, all_v = place.keys[past:s], place.values[past:s], place.keys[:s], place.values[:s]
                place.hand_over(keep, 0, (normed, q, k, new_v, q_rope, new_k, all_k, all_v))
            self._attend(pointers[i], t, s, (scores, *sizes, shares))
            self._run("lower", 256, (mixed, np.int64(mixed.size), low_q))
            self._product(layer.out, low_q, mixed, product)
            self._norm(product, m["attn_output"].bias, x, x, layer.ffn_norm, normed, low)
            if keep:
                place.hand_over(keep, 8, (scores, shares, mixed, product, x, normed))
            self._product(layer.gate_up, low, normed, gates)
            self._add_biases((gate, up), (m["ffn_gate"], m["ffn_up"]))
            self._run("swiglu", 1024, (gate, up, np.int64(swiglu.size), swiglu, low_f))
            self._product(layer.down, low_f, swiglu, product)
            after = w.layers[i + 1].attn_norm if i + 1 < hp.n_layers else w.norm
            self._norm(product, m["ffn_down"].bias, x, x, after, normed, low)
            if keep:
                place.hand_over(keep, 14, (gate, up, swiglu, product, x))
        if keep:
            keep("output_norm", normed)
        logits = self._floats(t, hp.n_vocab)
        self._product(w.output_group, low, normed, logits)
        self._add_biases((logits,), (w.output,))
        if keep:
            keep("logits", logits)
        return logits

    def _floats(self, *shape: int) -> Array:
        return self._xp.empty(shape, dtype=np.float32)

    def _lows(self, *shape: int) -> Array:
        return self._xp.empty(shape, dtype=np.float16)  # for bfloat16, too, which CuPy lacks: it has the same size

    def _run(self, name: str, blocks: int, arguments: tuple[Any, ...], threads: int = 256, shared: int = 0) -> None:
        self._kernels[name]((blocks,), (threads,), arguments, shared_mem=shared)

    def _norm(self, product: Array, bias: Array, residual: Array, total: Array, weight: Array, out: Array, low: Array) -> None:
        t, n = product.shape
        numbers = (np.float32(self._hp.eps), np.int32(n))
        self._run("add_norm", t, (product, _or_null(bias), _or_null(residual), total, weight, *numbers, out, low), shared=4 * n)

    def _add_biases(self, values: Sequence[Array], matrices: Sequence[Packed]) -> None:
        for value, matrix in zip(values, matrices, strict=True):
            if matrix.bias is not None:
                self._run("add_bias", len(value), (value, matrix.bias, np.int32(matrix.rows)))

    def _product(self, group: MatrixGroup, low: Array, wide: Array, out: Array) -> None:
        """x · Wᵀ for each matrix of a group, accumulated in float32: [T, in] -> [T, out], or [2, T, out] for two of one size.

        `low` is x rounded to the product's type; a group of float32 weights takes `wide`, the unrounded x.
        """
        t, cols, rows = low.shape[0], low.shape[1], sum(part.rows for part in group.parts)
        count = len(out) if out.ndim == 3 else 1
        weight, x, kind = self._in_low_type(group), low, self._type
        if group.kind == F32:
            weight, x, kind = group.joined.data.ptr, wide, _R_32F
        blas = self._cublas
        shape = (blas.CUBLAS_OP_T, blas.CUBLAS_OP_N, rows // count, t, cols, self._float_one)
        a, b = (weight, kind, cols), (x.data.ptr, kind, cols)
        c = (self._float_zero, out.data.ptr, _R_32F, rows // count)
        if count == 1:
            blas.gemmEx(self._handle, *shape, *a, *b, *c, _COMPUTE_32F, _DEFAULT_ALGORITHM)
            return
        strides = rows // count * cols, 0, rows // count * t
        blas.gemmStridedBatchedEx(
            self._handle, *shape, *a, strides[0], *b, strides[1], *c, strides[2], count, _COMPUTE_32F, _DEFAULT_ALGORITHM
        )

    def _in_low_type(self, group: MatrixGroup) -> int:
        """The address of a group's weights, contiguous and in half precision; weights of another type are converted first."""
        if group.kind == self._kind:
            return int(group.joined.data.ptr)
        if group.kind == F32:
            return 0
        size = sum(part.rows * part.cols for part in group.parts)
        if self._unpacked is None or self._unpacked.size < size:
            self._unpacked = self._lows(size)
        done = 0
        for part in group.parts:
            self._run("unpack", part.rows, (_struct(part), np.int32(part.cols), self._unpacked[done:]))
            done += part.rows * part.cols
        return int(self._unpacked.data.ptr)

    def _pointers(self, q_rope: Array, scores: Array, shares: Array, mixed: Array) -> Array:
        """Addresses of every head's matrices, for cuBLAS: [layers, 6, heads] — K, Q, scores; V, shares, weighted values."""
        hp, values = self._hp, self._step.values
        heads, size = np.arange(hp.n_heads), 4 * hp.head_size
        square = scores.shape[1] * scores.shape[2] * 4
        table = np.empty((hp.n_layers, 6, hp.n_heads), dtype=np.int64)
        bases = (q_rope.data.ptr, scores.data.ptr, shares.data.ptr, mixed.data.ptr)
        for place, base, step in zip((1, 2, 4, 5), bases, (size, square, square, size), strict=True):
            table[:, place] = base + heads * step
        for place, cache in ((0, "k_read"), (3, "v_read")):
            table[:, place] = (
                np.array([[held[cache].data.ptr] for held in values]) + heads // (hp.n_heads // hp.n_kv_heads) * size
            )
        return self._xp.asarray(table)

    def _attend(self, pointers: Array, t: int, s: int, soft_max: tuple[Any, ...]) -> None:
        """Compute scores, softmax and weighted values of all heads, in float32."""
        hp, blas = self._hp, self._cublas
        d, q_width, k_width = hp.head_size, hp.n_heads * hp.head_size, hp.n_kv_heads * hp.head_size
        k, q, scores, v, shares, mixed = (pointers.data.ptr + i * 8 * hp.n_heads for i in range(6))
        transposed, plain = blas.CUBLAS_OP_T, blas.CUBLAS_OP_N
        blas.sgemmBatched(
            self._handle,
            transposed,
            plain,
            s,
            t,
            d,
            self._float_one,
            k,
            k_width,
            q,
            q_width,
            self._float_zero,
            scores,
            s,
            hp.n_heads,
        )
        self._run("soft_max", hp.n_heads * t, soft_max)
        blas.sgemmBatched(
            self._handle,
            plain,
            plain,
            d,
            t,
            s,
            self._float_one,
            v,
            k_width,
            shares,
            s,
            self._float_zero,
            mixed,
            q_width,
            hp.n_heads,
        )


_POINTS = (
    "attn_norm", "q", "k", "v", "q_rope", "k_rope", "k_read", "v_read", "kq", "kq_soft_max", "kqv_out", "attn_out", "ffn_inp",
    "ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out", "l_out",
)  # fmt: skip


def _struct(matrix: Packed) -> NDArray[Any]:
    """A `Matrix` of weights.cuh as a kernel's argument."""
    return np.array(tuple(matrix.words()), dtype=[(f"word{i}", "<i8") for i in range(6)])


def _or_null(array: Array) -> Any:
    return np.int64(0) if array is None else array
