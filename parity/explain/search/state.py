"""States and candidates of the search: what `parity explain` has found so far, and what it may add."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
from msgspec import Struct, field

from checkpoints.points import parse
from engine.faults import SEEN, Fault, Planting
from engine.graph import POSITIONS, Step, sees_later
from engine.lift.node import GgmlOperation
from engine.replay.batched import by_rows
from engine.replay.right_values import same_start

from ..records.records import Floats

Layers = tuple[int, ...] | None
# Groups of faults that rebuild a matrix, which costs more than its product with one row.
WEIGHTS = ("weights", "dequantisation")


class Candidate(Struct, frozen=True, gc=False):
    """A fault with its parameters in some layers (None: all)."""

    fault: Fault
    parameters: Mapping[str, Any]
    layers: Layers = None

    def planted(self, state: "SearchState") -> list[Step]:
        """The state's steps with this fault. Raises NotApplicable if the fault does not apply."""
        return state.planting.of(self.fault, self.layers, self.parameters)


class RecordKey(Struct, frozen=True):
    """A record: the number of its point in the dump, and the replay's row."""

    point: int
    row: int

    def __lt__(self, other: "RecordKey") -> bool:
        return (self.point, self.row) < (other.point, other.row)


Screened = tuple[RecordKey | None, float]  # the first place that still differs, and the NMSE that is left at the old one


class SearchState(Struct, frozen=True, dict=True):
    """A list of steps and how far it reproduces the dump.

    `nmse` holds an array for each point; `first` is the first place that differs, None if none does. `root` is the state that
    this one is replayed against, if it is not worth a replay of its own.
    """

    faults: tuple[Candidate, ...]
    planting: Planting
    nmse: tuple[Floats, ...]
    first: RecordKey | None
    root: "SearchState | None" = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The engine's steps."""
        return self.planting.steps

    @property
    def order(self) -> Mapping[str, int]:
        """The number of each step."""
        return self.planting.order

    @cached_property
    def of_positions(self) -> frozenset[str]:
        """The positions, and what is made of nothing else."""
        names = {POSITIONS}
        names.update(step.makes for step in self.steps if step.names and names.issuperset(step.names))
        return frozenset(names)

    @cached_property
    def layers_begin(self) -> int:
        """The number of the first step in a layer; -1 if there is none."""
        return next((number for number, step in enumerate(self.steps) if parse(step.makes).layer is not None), -1)

    @cached_property
    def operations(self) -> Mapping[int, tuple[object, ...]]:
        """The operations of each layer's steps, in order."""
        by_layer: dict[int, list[object]] = {}
        for step in self.steps:
            layer = parse(step.makes).layer
            if layer is not None:
                by_layer.setdefault(layer, []).append(step.op.name if isinstance(step.op, GgmlOperation) else step.op)
        return {layer: tuple(operations) for layer, operations in by_layer.items()}

    @cached_property
    def mixing(self) -> list[int]:
        """The numbers of the steps that make a row of more than the same row of what they read."""
        return [number for number, step in enumerate(self.steps) if not by_rows(step)]

    @cached_property
    def shown(self) -> frozenset[str]:
        """Points for which the dump shows another value than the engine computed."""
        return shown_points(self.steps)


class Tried(Struct):
    """What the search has tried: counts, and for each state (by its `key`) the part of the error at its first place that each
    candidate removes.
    """

    faults: set[str] = field(default_factory=set)
    variants: int = 0
    removed: dict[tuple[str, ...], list[tuple[float, Candidate]]] = field(default_factory=dict)
    nearest: float = np.inf

    def count(self, candidates: Sequence[Candidate]) -> None:
        """Count candidates that were tried."""
        self.faults.update(candidate.fault.name for candidate in candidates)
        self.variants += len(candidates)


def worst(state: SearchState, until: int) -> float:
    """The largest NMSE up to a point."""
    return float(max((errors.max() for errors in state.nmse[: until + 1]), default=0.0))


def shown_points(steps: Sequence[Step]) -> frozenset[str]:
    """Points for which the dump shows another value than the engine computed."""
    last = takewhile(lambda step: step.makes.startswith(SEEN), reversed(steps))  # these steps are at the end
    return frozenset(step.makes.removeprefix(SEEN) for step in last)


def unchanged_steps(steps: Sequence[Step], root: SearchState) -> int:
    """How many steps at the start are the same as the root's."""
    return same_start(steps, root.steps)


def rows_enough(steps: Sequence[Step], rows: int, every: int) -> int:
    """How many first rows tell what so many rows are: all where later positions act on earlier ones, as in an encoder."""
    return every if sees_later(steps) else min(rows, every)


def key(faults: Sequence[Candidate]) -> tuple[str, ...]:
    """A key that identifies a list of faults."""
    return tuple(f"{candidate.fault.name} {candidate.parameters} {candidate.layers}" for candidate in faults)
