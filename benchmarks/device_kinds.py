"""Arithmetics of a real device, and mistakes made in them: functions from the right steps to those of an engine whose matrix products are
PyTorch's (cuBLAS's on a GPU), while everything else is computed by the steps' own module, NumPy or CuPy.

Without a GPU the same code runs PyTorch's products for processors, which round elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from kinds_of_engine import INSIDE
from msgspec.structs import replace

from checkpoints.points import parse
from engine import ops
from engine.backend import Array, module_of
from engine.graph import Step
from engine.replay.precision import each, multiplies

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class DeviceKind:
    """An arithmetic.

    Attributes:
        compute: the name that a header states.
        product: of two float32 tensors, in float32.
        store: the type in which every result is kept, None for float32.
        settings: those of `torch.backends.cuda.matmul` that are not off.
        attention: the type of PyTorch's fused attention, None for products and a soft max.
        exact: whether it is float32 throughout.
        without: the kinds of points that such an engine does not have.
    """

    compute: str
    product: Product = torch.matmul
    store: torch.dtype | None = None
    settings: tuple[str, ...] = ()
    attention: torch.dtype | None = None
    exact: bool = False
    without: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "without", INSIDE if self.attention is not None else frozenset())

    def __call__(self, steps: Sequence[Step]) -> list[Step]:
        """The steps of an engine in this arithmetic."""
        fused = steps if self.attention is None else _fused(steps, self.attention)
        return [
            replace(step, op=_On(step.op, self, product=multiplies(step) or isinstance(step.op, _Mistaken))) for step in fused
        ]


@dataclass(frozen=True)
class _On:
    """An operation in an arithmetic."""

    op: Callable[..., Array]
    kind: DeviceKind
    product: bool

    @property
    def name(self) -> str:
        """That of ggml's operation."""
        return getattr(self.op, "name", "")

    @property
    def takes_matrices(self) -> bool:
        """Whether the operation takes single matrices of a weight."""
        return getattr(self.op, "takes_matrices", False)

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        if not self.product:
            made = self.op(*inputs, **params)
        else:
            for setting in SETTINGS:
                setattr(torch.backends.cuda.matmul, setting, setting in self.kind.settings)
            with patch.object(np, "matmul", self._matmul):
                made = self.op(*inputs, **params)
        store = self.kind.store
        return made if store is None else each(lambda x: _back(_tensor(x).to(store).float(), x), made)

    def _matmul(self, a: Array, b: Array) -> Array:
        return _back(self.kind.product(_tensor(a), _tensor(b)), a)


SETTINGS = (
    "allow_tf32",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


def _tensor(x: Array) -> torch.Tensor:
    return torch.as_tensor(x.copy() if module_of(x) is np and not x.flags.writeable else x)


def _back(x: torch.Tensor, like: Array) -> Array:
    return x.numpy() if module_of(like) is np else module_of(like).asarray(x)


def in_type(low: torch.dtype) -> Product:
    """A product of factors of this type, whose result has it, too."""
    return lambda a, b: torch.matmul(a.to(low), b.to(low)).float()


def to_float32(low: torch.dtype) -> Product:
    """A product of factors of this type whose sums are written as float32."""

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a.to(low), b.to(low)
        if not a.is_cuda:
            return torch.matmul(a.float(), b.float())
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        flat = [x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b)]
        made = torch.bmm(*flat, out_dtype=torch.float32)
        return made.reshape(*batch, *made.shape[-2:])

    return product


def _fused(steps: Sequence[Step], low: torch.dtype) -> list[Step]:
    """Attention by PyTorch's kernel, which keeps no scores, where it is causal and nothing is added to a score."""
    made = {step.makes: step for step in steps}

    def attends(step: Step) -> Step:
        soft_max = made.get(str(step.reads[0])) if step.op is ops.weighted_values else None
        scores = made.get(str(soft_max.reads[0])) if soft_max is not None and soft_max.op is ops.causal_soft_max else None
        if soft_max is None or scores is None or scores.op is not ops.attention_scores or any(soft_max.weights):
            return step
        if soft_max.params.get("window", "causal") != "causal" or soft_max.params.get("max_bias", 0):
            return step
        heads, kv_heads, scale = scores.params["heads"], scores.params["kv_heads"], float(soft_max.params["scale"])

        def op(q: Array, k: Array, v: Array) -> Array:
            def by_head(x: Array, n: int) -> torch.Tensor:
                return _tensor(x).to(low).reshape(len(x), n, -1).transpose(0, 1)[None]

            keys, values = (by_head(x, kv_heads).repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
            attended = torch.nn.functional.scaled_dot_product_attention(
                by_head(q, heads), keys, values, is_causal=len(q) > 1, scale=scale
            )
            return _back(attended[0].transpose(0, 1).reshape(len(q), -1).float().contiguous(), q)

        return replace(step, op=op, reads=(*scores.reads[:2], step.reads[1]), weights=(), params={})

    return [attends(step) for step in steps]


_F16, _BF16 = torch.float16, torch.bfloat16
KINDS = {
    "F32": DeviceKind("f32", exact=True),
    "TF32": DeviceKind("tf32", settings=("allow_tf32",)),
    "F16 products": DeviceKind("f16", in_type(_F16)),
    "F16 products, float32 out": DeviceKind("f16", to_float32(_F16)),
    "F16 throughout": DeviceKind("f16", in_type(_F16), _F16),
    "F16 sums": DeviceKind(
        "f16", in_type(_F16), settings=("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction")
    ),
    "F16, fused attention": DeviceKind("f16", in_type(_F16), _F16, attention=_F16),
    "BF16 products": DeviceKind("bf16", in_type(_BF16)),
    "BF16 throughout": DeviceKind("bf16", in_type(_BF16), _BF16),
    "BF16, fused attention": DeviceKind("bf16", in_type(_BF16), _BF16, attention=_BF16),
}


# Mistakes. Each takes the right steps and gives None where the model has no place for it.


@dataclass(frozen=True)
class _Mistaken:
    """A product with a mistake."""

    op: Callable[..., Array]

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        return self.op(*inputs, **params)


Mistake = Callable[[Sequence[Step]], "list[Step] | None"]


def _changed(steps: Sequence[Step], test: Callable[[Step], bool], change: Callable[[Step], Step]) -> list[Step] | None:
    return [change(step) if test(step) else step for step in steps] if any(map(test, steps)) else None


def _scale(steps: Sequence[Step]) -> list[Step] | None:
    """Attention's scale of half the head size."""
    return _changed(
        steps,
        lambda step: step.op is ops.causal_soft_max,
        lambda step: replace(step, params={**step.params, "scale": step.params["scale"] * 2**0.5}),
    )


def _epsilon(steps: Sequence[Step]) -> list[Step] | None:
    return _changed(steps, lambda step: "eps" in step.params, lambda step: replace(step, params={**step.params, "eps": 1e-2}))


def _of_weight(change: Callable[[Array], Array]) -> Mistake:
    """One product of layer 1 whose weight [out, in] is read otherwise."""

    def mistake(steps: Sequence[Step]) -> list[Step] | None:
        last = next((step.makes for step in reversed(steps) if _in_layer(step, 1) and step.op is ops.linear), None)

        def changed(step: Step) -> Step:
            def op(x: Array, weight: Array, bias: Array | None = None) -> Array:
                return ops.linear(x, change(weight.reshape(-1, x.shape[1])), bias)

            return replace(step, op=_Mistaken(op))

        return _changed(steps, lambda step: step.makes == last, changed)

    return mistake


def _in_layer(step: Step, layer: int) -> bool:
    return parse(step.makes).layer == layer and not step.inner


def _transposed(weight: Array) -> Array:
    """A matrix in the other order; one of a single row, which has only one, from its end."""
    return weight.reshape(weight.shape[::-1]).T if len(weight) > 1 else weight[:, ::-1]


def _leading_dimension(weight: Array) -> Array:
    """Rows that begin 8 elements early each, as by a leading dimension of other padding."""
    rows, columns = weight.shape
    flat = module_of(weight).ascontiguousarray(weight).reshape(-1)
    return module_of(weight).lib.stride_tricks.as_strided(flat, (rows, columns), ((columns - 8) * 4, 4)).copy()


def _without_last_tile(weight: Array) -> Array:
    """Zeros where a kernel leaves out the last 16 of the sum."""
    cut = weight.copy()
    cut[:, -16:] = 0
    return cut


def _stale(rows: slice) -> Mistake:
    """Rows of layer 1's feed-forward or mixer that still are those of layer 0, whose buffer is the same."""

    def mistake(steps: Sequence[Step]) -> list[Step] | None:
        first = {parse(step.makes).kind for step in steps if _in_layer(step, 0) and step.op is ops.linear}
        there = [step for step in steps if _in_layer(step, 1) and step.op is ops.linear and parse(step.makes).kind in first]
        if not there:
            return None
        last = there[-1].makes

        def changed(step: Step) -> Step:
            count = len(step.reads)

            def op(*inputs: Array, **params: Any) -> Array:
                made = step.op(*inputs[:count], *inputs[count + 1 :], **params).copy()
                made[rows] = inputs[count][rows]
                return made

            return replace(step, op=_Mistaken(op), reads=(*step.reads, f"blk.0.{parse(step.makes).kind}"))

        return _changed(steps, lambda step: step.makes == last, changed)

    return mistake


MISTAKES: dict[str, Mistake] = {
    "scale of half a head": _scale,
    "epsilon 1e-2": _epsilon,
    "leading dimension": _of_weight(_leading_dimension),
    "transposed weight": _of_weight(_transposed),
    "last tile left out": _of_weight(_without_last_tile),
    "stale last row": _stale(slice(-1, None)),
}
