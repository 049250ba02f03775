"""A right engine that computes in float32 but keeps something that it reads in a lower type: its cache, its vectors, or RoPE's table."""

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..ggml_ops import OpParams
from ..ggml_ops.rope import rope_by_table
from ..graph import POSITIONS, History, Read, Step, View
from ..lift.node import GgmlOperation
from .precision import ROUNDINGS, each, multiplies

CACHE, VECTORS, GAINS, BIASES, ANGLES = "cache", "vectors", "gains", "biases", "angles"


class Kept(Struct, frozen=True):
    """The part that is kept in a lower type, and that type.

    CACHE: keys and values. VECTORS: norms' weights, biases and other weights that no product takes as its matrix. GAINS: those of them that
    multiply beside a bias. BIASES: those that are added. ANGLES: RoPE's cosines and sines.
    """

    part: str
    type: str


KEPT = {f"{kind} {part}": Kept(part, kind) for part in (CACHE, VECTORS, GAINS, BIASES, ANGLES) for kind in ("f16", "bf16")}
KEPT["q8 cache"] = Kept(CACHE, "q8")


class _Inputs(Struct, frozen=True):
    """An operation some of whose inputs were kept in a lower type."""

    op: Callable[..., Array]
    kind: str
    places: tuple[int, ...]

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        rounding = ROUNDINGS[self.kind]
        return self.op(*(each(rounding, x) if place in self.places else x for place, x in enumerate(inputs)), **params)


class _Rope(Struct, frozen=True):
    """RoPE by cosines and sines that were kept in a lower type."""

    kind: str

    def __call__(
        self,
        x: Array,
        positions: Array,
        factors: Array | None = None,
        *,
        heads: int,
        dims: int,
        base: float,
        scale: float,
        pairs: str,
    ) -> Array:
        tables = ops.rope_angles(positions, dims, base=base, scale=scale, factors=factors)
        cos, sin = (ROUNDINGS[self.kind](table) for table in tables)
        return ops.rotate(x, cos.astype(x.dtype), sin.astype(x.dtype), heads=heads, dims=dims, pairs=pairs)


class _GgmlRope(GgmlOperation, frozen=True):
    """The same for ggml's own operation."""

    kind: str

    def compute(self, *arguments: Any, params: OpParams, shape: tuple[int, ...]) -> Array:
        """The rotation, in ggml's four dimensions."""
        return rope_by_table(*arguments, params=params, keep=ROUNDINGS[self.kind])


def _by_kept_angles(step: Step, kind: str) -> Step:
    if step.op is ops.rope:
        return replace(step, op=_Rope(kind))
    ggml = isinstance(step.op, GgmlOperation) and step.op.name == "ROPE"
    return replace(step, op=_GgmlRope("ROPE", kind)) if ggml else step


def kept(steps: Sequence[Step], kind: str) -> list[Step]:
    """The steps of a right engine that computes in float32 and keeps a part in a lower type: `kind` is one of `KEPT`.

    Steps that this does not change are the same objects.
    """
    what = KEPT[kind]
    if what.part == ANGLES:
        return [_by_kept_angles(step, what.type) for step in steps]
    places_of = {CACHE: _histories, VECTORS: _vectors, GAINS: _gains, BIASES: _biases}[what.part]
    return [replace(step, op=_Inputs(step.op, what.type, places)) if (places := places_of(step)) else step for step in steps]


def _histories(step: Step) -> tuple[int, ...]:
    return tuple(place for place, read in enumerate(step.reads) if reads_cache(read))


def _vectors(step: Step) -> tuple[int, ...]:
    first = len(step.reads)
    return tuple(
        first + place
        for place, weight in enumerate(step.weights)
        if isinstance(weight, str) and (place or not multiplies(step))
    )


def _biases(step: Step) -> tuple[int, ...]:
    first = len(step.reads)
    return tuple(place for place in _vectors(step) if str(step.weights[place - first]).endswith(".bias"))


def _gains(step: Step) -> tuple[int, ...]:
    """The vectors beside a bias that is not kept with them; where there is no bias, they are all vectors (`VECTORS`)."""
    biases = _biases(step)
    return tuple(place for place in _vectors(step) if place not in biases) if biases else ()


def reads_cache(read: Read) -> bool:
    """Whether a step reads the cache directly, not by way of the points that show it."""
    of = read.of if isinstance(read, View) else read
    return isinstance(of, History) and of.of != POSITIONS
