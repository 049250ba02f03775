"""Runs changed lists of steps beside the right list: values that are still right are not computed again.

All positions are one pass. Rows do not depend on how the sequence was cut into passes, except in steps that read
`passes`; so one replay stands for a prompt and the tokens generated after it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..backend import Array, Backend, all_equal
from ..graph import PASSES, POSITIONS, TOKENS, Altered, Step, Weight, WeightSource, inputs_of
from ..inapplicable import NotApplicable
from .batched import can_batch, compute_batch
from .right_values import RightValues, Values, compute_planted, quiet, same_shape
from .versions import Versions

Visit = Callable[[str, Array], bool]  # a value that differs from the right run's; False ends the replay
Edits = Mapping[int, Sequence[Step]]  # the steps that replace a right one, by its number
Judge = Callable[[str, Array], Sequence[bool]]  # a value of several versions, [M, …]: which of them to go on with
Stop = Callable[[], bool]  # whether no time is left


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
        sure: a list of steps without faults, if the run's own steps may have some; else those of `longer`.
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
        sure: Sequence[Step] | None = None,
    ) -> None:
        self.weights = weights
        numbered = {TOKENS: tokens, POSITIONS: positions, PASSES: passes}
        self.rows = len(tokens)
        arrays = {name: backend.array(np.asarray(numbers, dtype=np.int64)) for name, numbers in numbered.items()}
        known = sure if sure is not None else steps if longer is None else longer.steps
        self.values: Mapping[str, Array] = RightValues(steps, {**arrays, **given}, weights, longer, known)
        self.on_host: Mapping[str, NDArray[Any]] = _OnHost(self.values, backend)
        self._xp = backend.xp
        self.steps: tuple[Step, ...] = tuple(steps)
        self._right = {step.makes: step for step in steps}
        self._last_reads: dict[int, tuple[dict[str, int], dict[int, list[str]]]] = {}

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
        with quiet():
            for step in steps[begin:] if begin else steps:
                if self._changes(step, changed) and not visit(step.makes, changed[step.makes]):
                    break
        return changed

    def changed(self, steps: Sequence[Step]) -> Values:
        """The values that change if these steps replace a right one, by name; none if the model's shapes do not allow them."""
        changed: Values = {}
        try:
            with quiet():
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
        inputs = inputs_of(step, lambda name: changed[name] if name in changed else self.values[name], self.weights)
        value = compute_planted(step, inputs, self.weights)
        if right is not None:
            before = self.values[step.makes]
            same_shape(step.makes, value, before)
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
        with quiet():
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
