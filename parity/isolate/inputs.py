"""The inputs of a step in one forward pass: recorded values, and unrecorded ones that follow from them.

Values between points (masks, the parts of a recurrent state) are computed from the nearest recorded ones. Histories are joined from
earlier passes; states are those that the last pass left.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from checkpoints.points import of_scores, parse
from checkpoints.printable import listed
from engine import ops
from engine.graph import ENCODED, POSITIONS, TOKENS, History, Read, State, Step, View, WeightSource, compute, name_of

from .routing import Routing, routings
from .values import CACHED, RecordedValue, rows_at

Array = NDArray[Any]
_NAMED = 3  # inputs that a reason names


class Program(Struct, frozen=True, dict=True):
    """The steps of one kind of pass, and the recorded values that each of them needs.

    `passed_over` are points that the dump lacks and that are computed instead.
    """

    steps: Sequence[Step]
    passed_over: Collection[str] = ()

    @cached_property
    def producers(self) -> Mapping[str, Step]:
        """The step that makes each value."""
        return {step.makes: step for step in self.steps}

    @cached_property
    def judged(self) -> Sequence[Step]:
        """Steps whose value is a point."""
        return [step for step in self.steps if not step.inner]

    @cached_property
    def carried(self) -> Sequence[Step]:
        """Steps between points whose value a later pass reads: states, and rows of a cache."""
        reads = [read for step in self.steps for read in step.reads]
        names = {read.of for read in reads if isinstance(read, State)}
        names |= {name for step in self.steps for name in step.histories}
        return [step for step in self.steps if step.makes in names and step.inner]

    @cached_property
    def remembered(self) -> frozenset[str]:
        """The values of which the rows of all passes are read."""
        return frozenset(name for step in self.steps for name in step.histories)

    @cached_property
    def shown(self) -> Mapping[str, Step]:
        """The values in ggml's order of dimensions, with the point that shows each with one row per position."""
        return {
            name_of(step.reads[0]): step
            for step in self.steps
            if step.op is ops.positions_first
            and not step.inner
            and isinstance(step.reads[0], View)
            and self.producers[name_of(step.reads[0])].inner
        }

    @cached_property
    def _needs(self) -> dict[str, frozenset[str]]:
        needs: dict[str, frozenset[str]] = {}
        for step in self.steps:
            needed: set[str] = set()
            for name in step.names:
                producer = self.producers.get(name)
                if name in (TOKENS, POSITIONS) or producer is None:
                    continue
                if name in self.shown and self.shown[name] is not step:
                    needed.add(self.shown[name].makes)
                    continue
                needed |= needs.get(name, frozenset()) if producer.inner else {name}
            needs[step.makes] = frozenset(needed)
        return needs

    @cached_property
    def routing(self) -> Mapping[str, Routing]:
        """The steps that choose experts or keys."""
        return routings(self.steps)

    def way(self, name: str) -> list[Step]:
        """The steps that lead from recorded values to a value, its own first."""
        way: dict[str, Step] = {}
        waiting = [name]
        while waiting:
            step = self.producers.get(waiting.pop())
            if step is not None and step.makes not in way and (step.inner or not way):
                way[step.makes] = step
                waiting += step.names
        return list(way.values())

    def needs(self, step: Step) -> frozenset[str]:
        """The recorded values of this pass from which a step's inputs follow."""
        return self._needs[step.makes]


class PassMemory(Struct):
    """What passes leave for later ones: the rows of values that histories read, and states; a state of None is not known."""

    past: dict[str, list[RecordedValue]] = field(default_factory=lambda: defaultdict(list))
    states: dict[str, Array | None] = field(default_factory=dict)
    passes: int = 0

    @property
    def first(self) -> int:
        """The first position of all passes."""
        return int(self.past[POSITIONS][0].positions[0])


class UnknownInput(ValueError):
    """An input is not known; the message says which and why."""


class Inputs:
    """The inputs of the steps of one pass.

    Args:
        tokens, positions: those of the pass, [T].
        live: recorded values by name, filled as they come.
        wide: they are given as float64, in which steps between points then compute.
    """

    def __init__(
        self,
        program: Program,
        weights: WeightSource,
        memory: PassMemory,
        positions: NDArray[np.int64],
        live: Mapping[str, RecordedValue],
        *,
        wide: bool = False,
    ) -> None:
        self._wide = wide
        self._program, self._weights, self._memory = program, weights, memory
        self._positions, self._live = positions, live
        self._between: dict[str, Array] = {}  # values between points, kept while later steps read them
        self._readers = Counter(name for step in program.steps for name in dict.fromkeys(step.names))

    def by(self, program: Program) -> "Inputs":
        """The same recorded values as inputs of another definition's steps."""
        return Inputs(program, self._weights, self._memory, self._positions, self._live)

    def widened(self) -> "Inputs":
        """The same recorded values as float64."""
        return Inputs(self._program, self._weights, self._memory, self._positions, self._live, wide=True)

    @property
    def seen(self) -> int:
        """Cached positions after this pass, S."""
        return int(self._positions.max()) + 1 - self._memory.first

    def of(self, step: Step, rows: NDArray[np.int64] | None = None) -> list[Array]:
        """The inputs of a step, whole values in the order of `step.reads`; with `rows` only those positions of recorded ones.

        Raises:
            UnknownInput: an input is not known.
        """
        given = [self._read(step, read, rows) for read in step.reads]
        return [value.astype(np.float64) if value.dtype == np.float32 else value for value in given] if self._wide else given

    def _read(self, step: Step, read: Read, rows: NDArray[np.int64] | None) -> Array:
        if isinstance(read, State):
            return self._state(read)
        of = read.of if isinstance(read, View) else read
        return self._history(of.of) if isinstance(of, History) else self._value(step, of, rows)

    def _state(self, read: State) -> Array:
        if not self._memory.passes:
            return np.zeros(read.shape, dtype=np.float32)
        state = self._memory.states.get(read.of)
        if state is None:
            raise UnknownInput("the state left by the previous pass is not known")
        return state

    def _value(self, step: Step, name: str, rows: NDArray[np.int64] | None) -> Array:
        if name == ENCODED:
            return self._encoded()
        if name in self._live:
            value = self._live[name]
            if parse(name).kind in CACHED or value.data.ndim == 1:
                return value.data if rows is None or value.data.ndim > 1 else value.data[np.searchsorted(value.positions, rows)]
            rows_of_value = value.data if rows is None else rows_at(name, value, rows)
            return rows_of_value if of_scores(name) else rows_of_value.reshape(len(rows_of_value), -1)
        producer = self._program.producers.get(name)
        if producer is None or not producer.inner:
            raise UnknownInput(f"its input {name} was not recorded as a whole")
        shown = self._program.shown.get(name)
        if shown is not None and shown is not step and shown.makes in self._live:  # no record is compared with itself
            view = shown.reads[0]
            encoded = len(self._encoded()) if isinstance(view, View) and any(size.encoded for size in view.whole) else 0
            return _as_ggml_has_it(shown, self._live[shown.makes].data, self.seen, encoded)
        if name not in self._between:
            computed = self.computed(producer)
            # A point has one row per position, like the recorded values.
            plain = name in self._program.passed_over and producer.axis == 0 and not of_scores(name)
            self._between[name] = computed.reshape(len(computed), -1) if plain else computed
        return self._between[name]

    def _encoded(self) -> Array:
        if ENCODED not in self._live:
            raise UnknownInput("the encoder's output was not recorded as a whole")
        return self._live[ENCODED].data

    def done_with(self, step: Step) -> None:
        """Drop the values that no step after `step` reads."""
        for name in dict.fromkeys(step.names):
            self._readers[name] -= 1
            if self._readers[name] <= 0:
                self._between.pop(name, None)

    def computed(self, step: Step) -> Array:
        """The value of a step between points.

        Raises:
            UnknownInput: one of its inputs is not known.
        """
        given = self.of(step)
        try:
            value: Array = compute(step, given, self._weights)
        except (ValueError, IndexError):  # a choice of experts that names none, say
            raise UnknownInput(f"{step.makes}, which it reads, does not follow from what was recorded") from None
        self.done_with(step)
        return value

    def _history(self, name: str) -> Array:
        parts = self._memory.past.get(name, [])
        if not parts:
            raise UnknownInput(f"no whole row of {name}, which the cache held")
        positions = np.concatenate([part.positions for part in parts])
        data = np.concatenate([part.data.reshape(len(part.positions), -1) for part in parts])
        order = {int(position): row for row, position in enumerate(positions)}
        wanted = range(self._memory.first, self._memory.first + self.seen)
        gap = next((position for position in wanted if position not in order), None)
        if gap is not None:
            raise UnknownInput(f"no whole row of {name} at position {gap}, which the cache held")
        rows = data[[order[position] for position in wanted]]
        return rows[:, 0] if name == POSITIONS else rows


def _as_ggml_has_it(shown: Step, rows: Array, seen: int, encoded: int) -> Array:
    """The recorded rows of a point, [T, n], as the value that it shows: with the positions in ggml's dimension."""
    view = shown.reads[0]
    assert isinstance(view, View)
    shape = [size.at(len(rows), seen, encoded) for size in view.whole]
    first = view.strides[0].at(len(rows), seen, encoded)
    axis = next(i for i, size in enumerate(view.whole) if size == view.shape[0] and prod(shape[i + 1 :]) == first)
    others = [n for i, n in enumerate(shape) if i != axis]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(len(rows), *others), 0, axis))


def reads_rows_alone(step: Step) -> bool:
    """Whether row t of the result follows from row t of the inputs (and a history), so that single positions can be judged."""
    return "result_shape" not in step.params and all(isinstance(read, str | History) for read in step.reads)


def inputs_named(step: Step) -> list[str]:
    """The values of this pass that a step reads directly, each once, without tokens, positions and an encoder's output."""
    names = [name_of(read) for read in step.reads if not isinstance(read, State)]
    return [name for name in dict.fromkeys(names) if name not in (TOKENS, POSITIONS, ENCODED)]


def as_subject(names: Sequence[str]) -> str:
    """Inputs as the subject of a sentence: up to three by name, of more the two that are nearest to the operation."""
    if len(names) == 1:
        return f"its input {names[0]} was"
    nearest = sorted(names, key=lambda name: (-1 if (layer := parse(name).layer) is None else layer, name))
    return f"its inputs {listed(nearest if len(names) <= _NAMED else [*nearest[-2:], 'earlier ones'])} were"
