"""Dependencies among the compared points: which errors are origins, which are inherited, and what lies between two points.

The value at (point p, position t) depends on every point that p is made from, directly or not, at positions ≤ t.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.dataflow import CACHE, Dataflow, of_vocabulary
from checkpoints.points import ENCODER, in_vocabulary, of_scores, order, parse
from checkpoints.record import Dump, Rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Upstream(Struct, frozen=True):
    """For each record, [R]: the worst NMSE of everything that it depends on, and whether any of that failed."""

    worst: Floats
    failed: Bools


class Stretch(Struct, frozen=True):
    """The operations between a point and the compared points before it.

    `inputs` are the compared points at which it begins; `unrecorded` are points in between that could also be recorded. `nodes` are all
    nodes of the stretch, the point itself first: their operations make the point from its inputs.
    """

    inputs: tuple[str, ...]
    unrecorded: tuple[str, ...]
    nodes: tuple[str, ...]


class Flow(Struct, frozen=True, dict=True):
    """A model's dataflow reduced to the compared points: `names`, in the order of computation.

    `known` is False if no dump says how points are made, and the vocabulary's order is used instead. `unmasked`: every position sees all
    others, as in an encoder.
    """

    whole: Dataflow
    names: tuple[str, ...]
    known: bool = False
    unmasked: bool = False

    def sees_later(self, name: str) -> bool:
        """Whether the attention that a point is made from has no causal mask."""
        return self.unmasked or name.startswith(ENCODER)

    @cached_property
    def may_rotate(self) -> bool:
        """Whether the model may have RoPE: unless all its operations are known, and that is none of them."""
        return not self.known or any(how.op == "ROPE" for how in self.whole.computations.values())

    @cached_property
    def _compared(self) -> frozenset[str]:
        return frozenset(self.names)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.whole.computations)}

    @cached_property
    def parents(self) -> dict[str, tuple[str, ...]]:
        """The nearest compared points that each compared point is made from."""
        nearest: dict[str, tuple[str, ...]] = {}
        for name, how in self.whole.computations.items():
            sources = (other for read in how.reads for other in ((read,) if read in self._compared else nearest[read]))
            nearest[name] = tuple(dict.fromkeys(sources))
        for number, name in enumerate(
            self.names
        ):  # a point that the dataflow does not know is taken to be made from the one before it
            nearest.setdefault(name, self.names[number - 1 : number])
        return {name: nearest[name] for name in self.names}

    @cached_property
    def children(self) -> dict[str, tuple[str, ...]]:
        """The nearest compared points that are made from each compared point; none if only the order of points is known."""
        children_of: dict[str, list[str]] = {name: [] for name in self.names}
        if self.known and not self.whole.computations:
            return dict.fromkeys(self.names, ())
        for name, parents in self.parents.items():
            if not self.known and name not in self.whole.computations:
                continue  # only its place in a file says that it comes after another point
            for other in parents:
                children_of[other].append(name)
        return {name: tuple(children) for name, children in children_of.items()}

    @cached_property
    def of_readers(self) -> "Flow":
        """The flow by which a point is judged from what is made from it: where no graph is known, that of the vocabulary's points alone.

        Where a point outside it stands in a file says neither what it is made from nor what reads it.
        """
        if self.known or all(in_vocabulary(name) for name in self.names):
            return self
        layers = 1 + max((parse(name).layer or 0 for name in self.whole.computations), default=0)
        inside = of_vocabulary([name for name in self.names if in_vocabulary(name)], layers)
        return replace(self, whole=inside)

    def ancestors(self, name: str) -> set[str]:
        """All compared points that a compared point depends on."""
        return _closure(name, self.parents)

    def descendants(self, name: str) -> set[str]:
        """All compared points that depend on a compared point."""
        return _closure(name, self.children)

    def between(self, name: str) -> Stretch | None:
        """The stretch from a compared point back to the compared points before it; None if the dataflow does not know the point."""
        if name not in self.whole.computations:
            return None
        waiting, inputs, unrecorded, nodes = [name], list[str](), list[str](), [name]
        seen = {name}
        while waiting:
            for other in self.whole.computations[waiting.pop(0)].reads:
                if other in seen:
                    continue
                seen.add(other)
                if other in self._compared:
                    inputs.append(other)
                    continue
                waiting.append(other)
                nodes.append(other)
                if not self.whole.part_of_next(other):
                    unrecorded.append(other)
        return Stretch(tuple(inputs), tuple(unrecorded), tuple(nodes))

    def path(self, above: str, below: str) -> set[str]:
        """All nodes on the paths from a compared point to one made from it with no other compared one in between, the last included."""
        stretch = self.between(below)
        on_the_way: set[str] = set()
        nodes = sorted(stretch.nodes, key=self._place.__getitem__) if stretch is not None else []
        for name in nodes:  # a node comes after what it reads
            if any(other == above or other in on_the_way for other in self.whole.computations[name].reads):
                on_the_way.add(name)
        return on_the_way

    def attends(self, name: str) -> bool:
        """Whether a node is the soft max of attention: over the product of two activations, and not over a router's scores."""
        how = self.whole.computations.get(name)
        if how is None or how.op not in ("SOFT_MAX", "FLASH_ATTN_EXT"):
            return False
        waiting, seen = list(how.reads), set[str]()
        while waiting:
            other = waiting.pop()
            origin = self.whole.computations[other]
            if len(origin.reads) > 1 and origin.op == "MUL_MAT":
                return True
            if other not in seen and origin.op not in ("MUL_MAT", "RMS_NORM", "NORM", "GET_ROWS"):
                seen.add(other)
                waiting += origin.reads
        return how.op == "FLASH_ATTN_EXT"

    def hidden(self, above: str, below: str) -> bool:
        """Whether every path from one point to another leads through the soft max of attention, which may hide an error."""
        return not self.reaches(above, below, lambda name: not self.attends(name))

    def reaches(self, above: str, below: str, passes: Callable[[str], bool]) -> bool:
        """Whether there is a path from one point to another on which `passes` is true of every node, the last one included."""
        reached, waiting = {above}, [above]
        while waiting:
            for other in self.whole.readers.get(waiting.pop(), ()):
                if other not in reached and passes(other):
                    reached.add(other)
                    waiting.append(other)
        return below in reached

    def mixes(self, above: str, below: str) -> bool:
        """Whether a product with weights lies on a path between two points: each element of the lower is then made from whole rows."""
        nodes = [self.whole.computations[name] for name in self.path(above, below) if name in self.whole.computations]
        return any(how.op in ("MUL_MAT", "MUL_MAT_ID", "OUT_PROD") and (how.weights or len(how.reads) == 1) for how in nodes)

    def operations(self, nodes: Iterable[str]) -> frozenset[str]:
        """ggml's names of the operations that make these nodes."""
        return frozenset(self.whole.computations[name].op for name in nodes if name in self.whole.computations)


def _closure(name: str, step: dict[str, tuple[str, ...]]) -> set[str]:
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        for other in step[waiting.pop()]:
            if other not in reached:
                reached.add(other)
                waiting.append(other)
    return reached


def dataflow_of(ours: Dump, ref: Dump) -> tuple[Dataflow | None, tuple[str, ...]]:
    """The dataflow that a dump's header gives, preferably the reference's; None if neither does. Also sentences for the user."""
    for dump in (ref, ours):
        if dump.header is not None and dump.header.dataflow is not None:
            try:
                return Dataflow.from_json(dump.header.dataflow), ()
            except ValueError as error:
                return None, (f"{dump.path}: {error}: the vocabulary's order is used instead",)
    return None, ()


def ordered(names: Collection[str], whole: Dataflow | None) -> list[str]:
    """Names in the order of computation; a name that the dataflow does not know stays after the name before it."""
    listed = order(names)
    if whole is None:
        return listed
    place = {name: number for number, name in enumerate(whole.computations)}
    keys: dict[str, tuple[int, int]] = {}
    last = -1
    for number, name in enumerate(listed):
        known = place.get(name)
        last = last if known is None else known
        keys[name] = (last, -1 if known is not None else number)
    return sorted(listed, key=keys.__getitem__)


def flow(names: Sequence[str], whole: Dataflow | None = None, n_layers: int | None = None, *, unmasked: bool = False) -> Flow:
    """The dataflow of compared points; without `whole`, by the vocabulary's order."""
    return Flow(whole or of_vocabulary(names, n_layers), tuple(names), whole is not None, unmasked)


def without_mask(points: Mapping[str, Rows]) -> bool | None:
    """Whether attention has no causal mask: the scores of all positions of the first pass have as many columns.

    None if no scores show it: none are recorded, their shape is not known, or the first pass has only one position.
    """
    for name, rows in points.items():
        if not of_scores(name) or name.startswith(ENCODER) or "cross" in name:
            continue
        here = np.flatnonzero((rows.seq == 0) & (rows.step == 0)).tolist()
        shapes = {rows.shapes[r] for r in here}
        if not shapes or any(len(shape) < 2 for shape in shapes):
            continue
        return len(shapes) == 1 if len(here) > 1 else None
    return None


def upstream(model: Flow, point: Ints, seq: Ints, token_idx: Ints, nmse: Floats, failed: Bools) -> Upstream:
    """The errors above each record.

    Args:
        model: the compared points; `point` int64 [R] is a record's index into its names, ascending.
        seq, token_idx: int64 [R].
        nmse: float64 [R], `failed`: bool [R].
    """
    worst, spoiled = np.zeros(len(point)), np.zeros(len(point), dtype=np.bool_)
    starts = np.searchsorted(point, np.arange(len(model.names) + 1))
    for sequence in sorted(set(seq.tolist())):  # np.unique would import numpy.ma, 20 ms
        places, place = np.unique(token_idx, return_inverse=True)
        nothing = _Front(np.zeros(len(places)), np.zeros(len(places), dtype=np.bool_))
        # Running maxima over positions, for each point together with all that it depends on.
        fronts: dict[str, _Front] = {}
        for number, name in enumerate(model.names):
            rows = np.arange(starts[number], starts[number + 1])
            rows = rows[seq[rows] == sequence]
            above = _join([nothing, *(fronts[other] for other in model.parents[name] if other in fronts)])
            at = place[rows]
            worst[rows], spoiled[rows] = above.worst[at], above.failed[at]
            front = _Front.of(at, nmse[rows], failed[rows], len(places))
            # Every position of an encoder, and of its decoder, sees all of the encoder's positions.
            front = front.everywhere() if model.sees_later(name) else front
            fronts[name] = _join([above, front]) if len(rows) else above
    return Upstream(worst, spoiled)


class _Front(Struct, frozen=True):
    """Per position: the worst error at it or before it, and whether anything failed there."""

    worst: Floats
    failed: Bools

    @staticmethod
    def of(at: Ints, nmse: Floats, failed: Bools, length: int) -> "_Front":
        worst, spoiled = np.zeros(length), np.zeros(length, dtype=np.bool_)
        worst[at], spoiled[at] = np.nan_to_num(nmse, nan=0.0, posinf=np.inf), failed
        return _Front(np.maximum.accumulate(worst), np.logical_or.accumulate(spoiled))

    def everywhere(self) -> "_Front":
        """The front if every position sees all others: the values at the last position, everywhere."""
        return _Front(np.full_like(self.worst, self.worst[-1:]), np.full_like(self.failed, self.failed[-1:]))


def _join(fronts: list[_Front]) -> _Front:
    if len(fronts) == 1:
        return fronts[0]
    return _Front(
        np.maximum.reduce([front.worst for front in fronts]), np.logical_or.reduce([front.failed for front in fronts])
    )


__all__ = ["CACHE", "Flow", "Stretch", "Upstream", "dataflow_of", "flow", "ordered", "upstream", "without_mask"]
