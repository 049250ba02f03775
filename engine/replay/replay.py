"""Runs changed lists of steps beside the right list: values that are still right are not computed again.

All positions are one pass. Rows do not depend on how the sequence was cut into passes, except in steps that read
`passes`; so one replay stands for a prompt and the tokens generated after it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..backend import Array, Backend, all_equal
from ..graph import PASSES, POSITIONS, TOKENS, Altered, Step, Weight, WeightSource, compute, inputs_of
from ..inapplicable import NotApplicable
from ..lift.node import GgmlOperation
from .batched import can_batch, compute_batch
from .versions import Versions

_QUIET = partial(np.errstate, over="ignore", invalid="ignore", divide="ignore")  # faults may overflow
_CHOICES = frozenset({"TOP_K", "ARGSORT"})
Visit = Callable[[str, Array], bool]  # a value that differs from the right run's; False ends the replay
Edits = Mapping[int, Sequence[Step]]  # the steps that replace a right one, by its number
Judge = Callable[[str, Array], Sequence[bool]]  # a value of several versions, [M, …]: which of them to go on with
Stop = Callable[[], bool]  # whether no time is left
Values = dict[str, Array]


class _Right(Mapping[str, Array]):
    """The values of the right run; each is computed, with all before it, when it is first asked for.

    `longer` is a run over the same tokens and perhaps more: the values of its first steps, if they are the same, are taken
    from there. No row of them may depend on a later one.

    Raises:
        NotApplicable: faults are planted in the right run's own steps, and the model's shapes do not allow them.
    """

    def __init__(self, steps: Sequence[Step], given: Values, weights: WeightSource, longer: "Replay | None") -> None:
        self._computed = given
        self._names = (*given, *(step.makes for step in steps))
        self._known = frozenset(self._names)
        self._steps = tuple(steps)
        self._by_name = {step.makes: step for step in steps}
        self._next = 0 if longer is None else same_start(steps, longer.steps)
        self._longer = longer
        self._same = frozenset(step.makes for step in steps[: self._next])
        self._taken = _by_rows(steps[: self._next])
        self._weights = weights

    def __getitem__(self, name: str) -> Array:
        if name not in self._known:
            raise KeyError(name)
        if name not in self._computed and self._longer is not None and name in self._same:
            if name in self._taken:
                self._computed[name] = _first_rows(self._longer.values[name], len(self._computed[TOKENS]))
            else:
                step = self._by_name[name]
                with _QUIET():
                    self._computed[name] = compute(step, inputs_of(step, self.__getitem__, self._weights), self._weights)
        while name not in self._computed:
            step = self._steps[self._next]
            with _QUIET():
                self._computed[step.makes] = compute(step, inputs_of(step, self.__getitem__, self._weights), self._weights)
            self._next += 1
        return self._computed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def same_start(steps: Sequence[Step], others: Sequence[Step]) -> int:
    """How many steps at the start of two lists are identical objects."""
    pairs = enumerate(zip(steps, others, strict=False))
    return next((number for number, (step, other) in pairs if step is not other), min(len(steps), len(others)))


def _by_rows(steps: Sequence[Step]) -> frozenset[str]:
    """The values that over fewer tokens are a part of those over more: rows by position, the same whatever follows.

    Others are values without positions, columns for as many keys as there are, and chosen keys, which of a row with few keys may be
    ones after it; and what is made of these and is no point.
    """
    others: set[str] = set()
    for step in steps:
        of_others = step.inner and not others.isdisjoint(step.names)
        if step.axis is None or of_others or (isinstance(step.op, GgmlOperation) and _follows_length(step, step.op.name)):
            others.add(step.makes)
    return frozenset(step.makes for step in steps) - others


def _follows_length(step: Step, operation: str) -> bool:
    """Whether the rows of a ggml operation's value have as many columns as there are keys, or numbers of keys."""
    columns = step.params["result_shape"][1:] if step.axis == 0 else ()
    read = [size for operand in step.params["operands"] if operand is not None for size in operand.whole]
    return any(not size.constant for size in columns) or (operation in _CHOICES and any(size.cached for size in read))


def _first_rows(value: Array, rows: int) -> Array:
    """A value restricted to the first rows: [T, n] -> [rows, n], attention's [H, T, T] -> [H, rows, rows]."""
    return value[:, :rows, :rows] if value.ndim == 3 else value[:rows]


class _OnHost(Mapping[str, NDArray[Any]]):
    """The same values as NumPy arrays."""

    def __init__(self, values: Mapping[str, Array], backend: Backend) -> None:
        self._values = values
        self._backend = backend

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._backend.to_host(self._values[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Replay:
    """The right run of a model over some tokens, with all its values, and replays of changed lists.

    Args:
        positions, passes: int64 [T]; the position of each token, and the number of the forward pass it belongs to.
        longer: a causal run over these tokens and perhaps more, whose values are used for the steps that both begin with.
            Over fewer rows a product may round differently: a step that changes nothing then differs by that noise.
        given: further values that steps read and none of them makes, whatever the number of rows.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        tokens: Sequence[int],
        positions: Sequence[int],
        passes: Sequence[int],
        weights: WeightSource,
        backend: Backend,
        longer: "Replay | None" = None,
        given: Mapping[str, Array] = MappingProxyType({}),
    ) -> None:
        self.weights = weights
        numbered = {TOKENS: tokens, POSITIONS: positions, PASSES: passes}
        self.rows = len(tokens)
        arrays = {name: backend.array(np.asarray(numbers, dtype=np.int64)) for name, numbers in numbered.items()}
        self.values: Mapping[str, Array] = _Right(steps, {**arrays, **given}, weights, longer)
        self.on_host: Mapping[str, NDArray[Any]] = _OnHost(self.values, backend)
        self._xp = backend.xp
        self.steps = tuple(steps)
        self._right = {step.makes: step for step in steps}
        self._last_reads: dict[int, tuple[dict[str, int], dict[int, list[str]]]] = {}

    def _compute(self, step: Step, changed: Values) -> Array:
        inputs = inputs_of(step, lambda name: changed[name] if name in changed else self.values[name], self.weights)
        return compute(step, inputs, self.weights)

    def run(self, steps: Sequence[Step], visit: Visit, begin: int = 0) -> Values:
        """Compute what differs from the right run, in order, until `visit` returns False.

        `begin` is the number of steps at the start that are known to be right. A value that is bit-equal to the
        right one counts as right, so that steps that read only such values are not computed.

        Returns:
            The values that differ, by name.

        Raises:
            NotApplicable: the model's shapes do not allow this change.
        """
        changed: Values = {}
        with _QUIET():
            for step in steps[begin:] if begin else steps:
                if self._changes(step, changed) and not visit(step.makes, changed[step.makes]):
                    break
        return changed

    def changed(self, steps: Sequence[Step]) -> Values:
        """The values that change if these steps replace a right one, by name; none if the model's shapes do not allow them."""
        changed: Values = {}
        try:
            with _QUIET():
                for step in steps:
                    self._changes(step, changed)
        except NotApplicable:
            return {}
        return changed

    def _changes(self, step: Step, changed: Values) -> bool:
        """Compute a step if it can differ from the right run, and add its value to `changed` if it does. False ends the run."""
        right = self._right.get(step.makes)
        if changed.keys().isdisjoint(step.names) and right is not None:
            if right is step:
                return False
            prepared = self._with_altered_weights(step, right)
            if prepared is None:
                return False
            step = prepared
        try:
            value = self._compute(step, changed)
        except (ValueError, IndexError) as error:  # NumPy's: no such shapes or rows, where the fault does not fit this model
            raise NotApplicable(f"{step.makes}: {error}") from error
        if right is not None:
            before = self.values[step.makes]
            if value.shape != before.shape:
                raise NotApplicable(f"{step.makes} has shape {value.shape} instead of {before.shape}")
            if all_equal(value, before):
                return False
        changed[step.makes] = value
        return True

    def run_batch(
        self,
        edits: Sequence[Edits],
        end: int,
        watched: frozenset[str],
        judge: Judge,
        stop: Stop = lambda: False,
        pause: int | None = None,
    ) -> list[Values | None]:
        """Compute many versions of the steps before number `end` together: steps that a version shares with the right run are
        computed for all versions at once.

        Args:
            edits: for each version.
            watched: names at which `judge` says which versions go on.
            stop: asked before each computation; once it returns True all versions end.
            pause: the number of the step before which to end, where what the steps from there to `end` read is wanted.

        Returns:
            For each version the values that differ from the right run and are still to be read; None for one that `judge` or
            `stop` ended or that the model's shapes do not allow.
        """
        changed = Versions(self.values, len(edits))
        owners: dict[int, list[int]] = {}
        for version, edit in enumerate(edits):
            for number in edit:
                owners.setdefault(number, []).append(version)
        used_up = self._used_up(edits, end)
        with _QUIET():
            for number in range(min(owners), end if pause is None else pause):
                if stop():
                    return [None] * len(edits)
                name = self.steps[number].makes
                self._advance(number, edits, owners.get(number, ()), changed, stop)
                still_computed, values = changed.having(name) if name in watched else ([], None)
                if values is not None:
                    keep = judge(name, values)
                    changed.end([version for version, kept in zip(still_computed, keep, strict=True) if not kept])
                for old in used_up.get(number, ()):
                    changed.forget(old)
        return changed.left()

    def _advance(self, number: int, edits: Sequence[Edits], owners: Sequence[int], changed: Versions, stop: Stop) -> None:
        """One step of `run_batch`; `owners` are the versions that have steps of their own in its place."""
        step = self.steps[number]
        reading = changed.reading(step.names).difference(owners)
        alone = changed.apart(step.names) & reading if reading and can_batch(step) else reading
        self._advance_each(number, edits, {*owners, *alone}, changed, stop)
        same = sorted(reading - alone)
        if not same:
            return
        inputs = [changed.joined(name, same) for name in step.names]
        try:
            batch = compute_batch(step, inputs, len(same), self.weights)
        except (ValueError, IndexError):  # one of them names an expert that does not exist
            self._advance_each(number, edits, same, changed, stop)
            return
        changed.put(step.makes, same, batch)

    def _advance_each(
        self, number: int, edits: Sequence[Edits], versions: Iterable[int], changed: Versions, stop: Stop
    ) -> None:
        """One step of `run_batch`, version by version; what versions with the same steps of their own make of right values is made once."""
        made: dict[str, dict[int, Array]] = {}
        alike: dict[int, Values] = {}
        for version in sorted(versions):
            if stop():
                break
            if not changed.goes_on(version):
                continue
            steps = edits[version].get(number, (self.steps[number],))
            known = changed.of(version, {name for step in steps for name in step.names})
            values = dict(known) if known or id(steps) not in alike else alike[id(steps)]
            try:
                for step in steps if not values or known else ():
                    self._changes(step, values)
            except NotApplicable:
                changed.end([version])
                continue
            if not known:
                alike[id(steps)] = values
            for name, value in values.items():
                if value is not known.get(name):
                    made.setdefault(name, {})[version] = value
        for name, of_name in made.items():
            changed.put_each(name, of_name)

    def _used_up(self, edits: Sequence[Edits], end: int) -> dict[int, list[str]]:
        """Names by the number of the last step that reads them."""
        if end not in self._last_reads:
            reads = {name: number for number, step in enumerate(self.steps[:end]) for name in (step.makes, *step.names)}
            reads.pop(self.steps[end - 1].makes, None)
            by_number: dict[int, list[str]] = {}
            for name, number in reads.items():
                by_number.setdefault(number, []).append(name)
            self._last_reads[end] = reads, by_number
        reads, by_number = self._last_reads[end]
        later: dict[str, int] = {}
        for edit in edits:
            for number, steps in edit.items():
                later.update(
                    {name: number for step in steps for name in step.names if later.get(name, reads.get(name, number)) < number}
                )
        result = dict(by_number)
        for name, number in later.items():
            result[reads[name]] = [other for other in result[reads[name]] if other != name]
            result[number] = [*result.get(number, ()), name]
        return result

    def _with_altered_weights(self, step: Step, right: Step) -> Step | None:
        """The step, with its first altered weight computed if only weights change; None if all of them are the right run's own arrays."""
        if step.op is not right.op or step.reads != right.reads or step.params != right.params:
            return step
        if len(step.weights) != len(right.weights):
            return step
        weights: list[Weight] = []
        for new, old in zip(step.weights, right.weights, strict=True):
            if new == old:
                weights.append(new)
                continue
            if not (isinstance(new, Altered) and isinstance(old, str)):
                return step
            array = new.make(self.weights, new.weight)
            if array is not self.weights.get(old):
                return replace(step, weights=(*weights, _with_array(new, array), *step.weights[len(weights) + 1 :]))
            weights.append(new)
        return None


def _with_array(weight: Altered, array: Array) -> Altered:
    """An altered weight whose array is known already."""
    return replace(weight, make=lambda _source, _name: array)
