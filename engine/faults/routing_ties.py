"""The other outcome of a near tie: at some positions the first expert not chosen replaces the last one chosen. This is no fault."""

from collections.abc import Collection

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Step, View, name_of
from .base import Steps
from .edits import ggml


class _Taken(Struct, frozen=True):
    """The chosen experts, out of all in the order of their scores; at `rows`, the first that was not chosen replaces the last."""

    rows: tuple[int, ...]

    def __call__(self, chosen: Array, ranked: Array) -> Array:
        taken = chosen.copy()
        rows = [row for row in self.rows if row < len(taken)]
        taken[rows, -1] = ranked[rows, taken.shape[-1]]
        return taken


def scores_of(step: Step, right: Steps) -> tuple[str, int] | None:
    """The scores by which a step chooses the first experts, and how many it chooses; None for any other step."""
    read = step.reads[0] if step.reads else None
    if step.op not in (ops.part,) and not isinstance(step.op, _Taken):
        return None
    if not isinstance(read, View) or not read.shape[-1].constant or len(read.shape) != 2:
        return None
    ranked = right.get(name_of(read))
    if ranked is None or not ggml(ranked, "ARGSORT") or read.shape[-1].fixed >= read.whole[-1].fixed:
        return None
    return name_of(ranked.reads[0]), read.shape[-1].fixed


def taken_otherwise(step: Step, rows: Collection[int]) -> Step:
    """The step of `scores_of` with the other expert at these rows, and at those at which it already takes it."""
    before = step.op.rows if isinstance(step.op, _Taken) else ()
    reads = (step.reads[0], name_of(step.reads[0]))
    return replace(step, op=_Taken(tuple(sorted({*before, *rows}))), reads=reads)
