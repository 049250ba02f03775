"""A model is a list of steps: this file defines a step and the loop that runs them.

Running, isolating and explaining use the same list: they run all steps, one step with given inputs, or a list in which
one step was replaced.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from math import isqrt
from typing import Any, Protocol

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.graph import NOTHING, Size
from checkpoints.points import ENCODER

from .backend import Array, module_of
from .weights.matrices import Matrices

TOKENS = "tokens"
POSITIONS = "positions"
ENCODED = "encoded"  # an encoder's output, which a decoder reads: [E, D]
PASSES = "passes"  # the number of the forward pass that each position belongs to: 0 for the prompt, then 1, 2, …
GIVEN = frozenset({TOKENS, POSITIONS, PASSES})  # values that every run has


class History(Struct, frozen=True):
    """A step reads rows 0…t of a value: those of earlier passes come from the KV cache."""

    of: str


class State(Struct, frozen=True):
    """A step reads what the previous pass left: its value of `of`, which a step of this pass computes anew; zeros in the first pass."""

    of: str
    shape: tuple[int, ...]


class View(Struct, frozen=True):
    """A step reads a part of a value, or its elements in another order, as ggml's views do: no copy.

    Attributes:
        of: the value that is read, or the history of one.
        whole: the shape of that value, as sizes of T, S and E.
        shape, strides, offset: of the elements that are read, in elements of the value's contiguous memory.
    """

    of: str | History
    whole: tuple[Size, ...]
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size = NOTHING

    def apply(self, value: Array) -> Array:
        """The elements that are read.

        Raises:
            ValueError: the value has another shape than `whole`, or the view reaches beyond it.
        """
        lengths = bound(self.whole, value.shape)
        shape = tuple([size.at(*lengths) for size in self.shape])
        strides = tuple([size.at(*lengths) for size in self.strides])
        start = self.offset.at(*lengths)
        last = start + sum([(n - 1) * stride for n, stride in zip(shape, strides, strict=True)])
        if min(start, *shape, *strides) < 0 or (last >= value.size and 0 not in shape):
            raise ValueError(f"a view of {shape} reaches beyond the {value.size} elements of {self.of}")
        flat = value.reshape(-1)[start:]
        view: Array = module_of(value).lib.stride_tricks.as_strided(flat, shape, tuple([n * flat.itemsize for n in strides]))
        return view


def bound(sizes: Sequence[Size], shape: Sequence[int]) -> tuple[int, int, int]:
    """T, S and E of a value of that shape; 0 for those that its sizes do not depend on.

    Raises:
        ValueError: the shape has another number of dimensions.
    """
    t = s = e = 0
    for size, n in zip(sizes, shape, strict=True):
        if size.tokens and not size.cached and not size.product:
            t = (n - size.fixed) // size.tokens
        elif size.cached and not size.tokens and not size.product:
            s = (n - size.fixed) // size.cached
        elif size.square and not size.tokens:
            t = isqrt((n - size.fixed) // size.square)
        elif size.encoded and not size.tokens and not size.crossed:
            e = (n - size.fixed) // size.encoded
    return t, s, e


Read = str | History | State | View


class RowsOf(Struct, frozen=True):
    """A step takes single rows of a weight: it gets a function ids -> rows, so that only those rows are dequantised."""

    weight: str


class WeightPart(Struct, frozen=True):
    """A step takes a part of a weight: shape, strides and offset in elements."""

    weight: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Altered(Struct, frozen=True):
    """A weight that differs from the file's: `make(source, name)` gives it. Faults are planted with it."""

    weight: str
    make: Callable[["WeightSource", str], Array]


Weight = str | RowsOf | WeightPart | Altered | None


class Step(Struct, frozen=True, dict=True):
    """One operation: `makes = op(*reads, *weights, **params)`.

    `reads` names values made by earlier steps (or `tokens`, `positions`, `passes`), their `History`, a `View` of one of these, or
    a recurrent `State`; a weight of None stands for an optional one that this model lacks.

    Attributes:
        axis: which dimension of its value is the position: 0, or 1 for attention's scores [H, T, S]; None if there is none.
        inner: its value is not a point: only other steps read it.
    """

    makes: str
    op: Callable[..., Array]
    reads: tuple[Read, ...]
    weights: tuple[Weight, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    axis: int | None = 0
    inner: bool = False

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the values that it reads, histories included but not states, which come from the previous pass."""
        return tuple([name_of(read) for read in self.reads if not isinstance(read, State)])

    @cached_property
    def histories(self) -> tuple[str, ...]:
        """The names of the values of which it reads the rows of all passes."""
        sources = [read.of if isinstance(read, View) else read for read in self.reads]
        return tuple([source.of for source in sources if isinstance(source, History)])


def made_from(name: str, steps: Iterable[Step]) -> frozenset[str]:
    """All values that are made from one, directly or through others."""
    made = set[str]()
    for step in steps:
        if name in step.names or not made.isdisjoint(step.names):
            made.add(step.makes)
    return frozenset(made)


def leading_to(names: Iterable[str], steps: Sequence[Step]) -> list[Step]:
    """The steps from which some values are made, in order, those that make them included."""
    wanted, needed = set(names), list[Step]()
    for step in reversed(steps):
        if step.makes in wanted:
            wanted.update(step.names)
            needed.append(step)
    return needed[::-1]


def sees_later(steps: Sequence["Step"]) -> bool:
    """Whether a position attends to later ones, as an encoder's do."""
    return any(step.params.get("window") in ("all", "symmetric") for step in steps)


def in_one_pass(steps: Sequence["Step"]) -> bool:
    """Whether a prompt must be computed at once: later positions change earlier ones, or nothing is kept for a later pass."""
    return sees_later(steps) or not any(step.histories or any(isinstance(name, State) for name in step.reads) for step in steps)


def alone(encoder: Sequence["Step"]) -> tuple["Step", ...]:
    """The steps of an encoder as a model by itself, whose tokens and positions are the prompt's."""
    inputs = {ENCODER + name: name for name in (TOKENS, POSITIONS)}

    def renamed(read: Read) -> Read:
        return read_as(read, inputs.get(name_of(read), name_of(read)))

    return tuple(replace(step, reads=tuple(map(renamed, step.reads))) for step in encoder)


def weight_name(weight: Weight) -> str:
    """The name of a weight in the file, whatever form a step takes it in; "" if there is none."""
    return weight if isinstance(weight, str) else "" if weight is None else weight.weight


def name_of(read: Read) -> str:
    """The name of the value that is read."""
    of = read.of if isinstance(read, View) else read
    return of if isinstance(of, str) else of.of


def read_as(read: Read, name: str) -> Read:
    """The same read of a value of another name."""
    if isinstance(read, str):
        return name
    if isinstance(read, View):
        return replace(read, of=History(name) if isinstance(read.of, History) else name)
    return replace(read, of=name)


def viewed(read: Read, value: Array) -> Array:
    """The elements of a value that a step reads."""
    return read.apply(value) if isinstance(read, View) else value


class WeightSource(Protocol):
    """Where steps get their weights from."""

    def raw(self, name: str) -> tuple[NDArray[np.uint8], int, tuple[int, ...]]:
        """The file's own bytes [rows, bytes per row], their ggml type and the weight's shape."""

    def array(self, host: NDArray[Any]) -> Array:
        """A host array on the side where the steps compute."""

    def get(self, name: str) -> Array:
        """The whole weight, float32."""

    def matrices(self, name: str) -> Matrices:
        """A weight [.., out, in] of which single matrices are taken, float32: only those are dequantised."""

    def rows(self, name: str, ids: Array) -> Array:
        """The given rows of it, float32."""


class Cache(Protocol):
    """What `History` is read from."""

    def append(self, name: str, rows: Array) -> None:
        """Add the rows of this pass."""

    def read(self, name: str) -> Array:
        """Rows 0…t."""

    def state(self, read: State) -> Array:
        """The state that the last pass left; zeros before the first pass."""

    def leave(self, name: str, value: Array) -> None:
        """Keep a state for the next pass."""


Tap = Callable[[str, Array], None]


def inputs_of(step: Step, value: Callable[[str], Array], weights: WeightSource) -> list[Array]:
    """The whole values that a step reads if all positions are one pass: `value` gives them by name, and states are zeros."""
    return [
        weights.array(np.zeros(read.shape, np.float32)) if isinstance(read, State) else value(name_of(read))
        for read in step.reads
    ]


# Damaged weights overflow: the values show it.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def compute(step: Step, inputs: Sequence[Array], weights: WeightSource) -> Array:
    """Run one step on given inputs: whole values in the order of `step.reads`, of which the step's views are taken."""
    single = getattr(step.op, "takes_matrices", False)
    arguments = [
        weights.matrices(weight) if single and isinstance(weight, str) else weight_of_step(weight, weights)
        for weight in step.weights
    ]
    seen = [viewed(read, value) for read, value in zip(step.reads, inputs, strict=True)]
    return step.op(*seen, *arguments, **step.params)


def _given(read: Read, live: Mapping[str, Array], cache: Cache) -> Array:
    """The whole value that is read from."""
    if isinstance(read, State):
        return cache.state(read)
    of = read.of if isinstance(read, View) else read
    return live[of] if isinstance(of, str) else cache.read(of.of)


def weight_of_step(weight: Weight, source: WeightSource) -> Any:
    """The form in which an operation gets a weight: an array, None, or a function that takes rows."""
    if isinstance(weight, Altered):
        return weight.make(source, weight.weight)
    if isinstance(weight, RowsOf):
        return lambda ids: source.rows(weight.weight, ids)
    if isinstance(weight, WeightPart):
        sizes = tuple(map(Size, weight.shape)), tuple(map(Size, weight.strides)), Size(weight.offset)
        whole = source.get(weight.weight)
        return View(weight.weight, tuple(map(Size, whole.shape)), *sizes).apply(whole)
    return None if weight is None else source.get(weight)


def run(
    steps: Sequence[Step], values: dict[str, Array], weights: WeightSource, cache: Cache, tap: Tap, keep: Iterable[str] = ()
) -> dict[str, Array]:
    """Compute every step, give each result to the tap, and drop the values that no later step reads.

    Args:
        values: the given values: `tokens`, `positions` and `passes`, and, if the run starts in the middle, the last value before it.
        keep: names of values to return besides the last step's.

    Returns:
        The last step's value and the kept ones, by name.
    """
    last_use = {name: index for index, step in enumerate(steps) for name in step.names}
    remembered = {name for step in steps for name in step.histories}
    carried = {read.of for step in steps for read in step.reads if isinstance(read, State)}
    wanted = {*keep, steps[-1].makes} if steps else set(keep)
    live = dict(values)
    for name in remembered & live.keys():
        cache.append(name, live[name])
    for index, step in enumerate(steps):
        value = compute(step, [_given(read, live, cache) for read in step.reads], weights)
        if not step.inner:
            tap(step.makes, value)
        live[step.makes] = value
        if step.makes in remembered:
            cache.append(step.makes, value)
        if step.makes in carried:
            cache.leave(step.makes, value)
        for name in (*step.names, step.makes):
            if last_use.get(name, -1) <= index and name not in wanted:
                live.pop(name, None)
    return {name: live[name] for name in wanted if name in live}
