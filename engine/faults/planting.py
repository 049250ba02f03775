"""How a fault is planted into a list of steps."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from msgspec.structs import replace

from checkpoints.points import ENCODER

from ..graph import GIVEN, Read, Step, name_of, read_as
from ..inapplicable import NotApplicable
from .arguments import alike, takes
from .base import AT, SEEN, Fault, Parameters, Steps, kinds_of, layer_near
from .index import StepsByName

_ANY = -1  # stands for every layer
_KEPT = 1 << 15  # changed steps that are kept, about a kilobyte each


class _Asked(Mapping[str, Any]):
    """A fault's parameters. They note whether the fault read the kinds of step in which it is planted."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self.at = False

    def __getitem__(self, name: str) -> Any:
        self.at = self.at or name == AT
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


class Planting:
    """A list of steps to plant many faults in, indexed once, when the index is first needed.

    `recorded` are the points that a dump has; a fault of the capture changes what is shown for these only (None: for all).
    """

    def __init__(self, steps: Sequence[Step], recorded: Collection[str] | None = None) -> None:
        self.steps = tuple(steps)
        self._recorded = recorded
        self._begins: dict[tuple[tuple[str, ...], tuple[int, ...] | None], int] = {}
        self._numbers_at: dict[tuple[tuple[str, ...], tuple[int, ...] | None], Sequence[int]] = {}
        #: What faults put in the place of a step, by its number and their parameters: a reason where they do not apply.
        self._changed: dict[tuple[object, ...], tuple[Step, ...] | str] = {}
        self._rest: dict[int, tuple[Parameters, str]] = {}

    @cached_property
    def right(self) -> Steps:
        """The steps by name."""
        return StepsByName({step.makes: step for step in self.steps})

    @cached_property
    def order(self) -> Mapping[str, int]:
        """The number of each step."""
        return {step.makes: number for number, step in enumerate(self.steps)}

    @cached_property
    def _places(self) -> Mapping[tuple[str, int | None], Sequence[int]]:
        """The numbers of the steps, by kind and layer; of one that is computed twice both, by the kinds of the first as well."""
        places: dict[tuple[str, int | None], list[int]] = {}
        for number, step in enumerate(self.steps):
            layer = layer_near(step)
            for kind in dict.fromkeys((*kinds_of(step), *kinds_of(self._twins.get(number, step)))):
                places.setdefault((kind, layer), []).append(number)
                if layer is not None:
                    places.setdefault((kind, _ANY), []).append(number)
        return places

    @cached_property
    def _twins(self) -> Mapping[int, Step]:
        """Steps that repeat an earlier one, by their numbers: an engine computes once what llama.cpp computes twice of one value with
        one weight, as a norm for attention and for a scan beside it.
        """
        first: dict[tuple[object, ...], Step] = {}
        weighted = ((number, step) for number, step in enumerate(self.steps) if step.weights)
        found = (
            (number, first.setdefault((step.op, step.reads, step.weights, repr(step.params)), step))
            for number, step in weighted
        )
        return {number: step for number, step in found if step is not self.steps[number]}

    def has_layers(self, fault: Fault) -> bool:
        """Whether some layer has a step that the fault changes."""
        return any((kind, _ANY) in self._places for kind in fault.kinds)

    def edits(
        self, fault: Fault, layers: Collection[int] | None, parameters: Parameters, end: int | None = None
    ) -> dict[int, tuple[Step, ...]]:
        """The replacements of the steps that this fault changes (of those before number `end`), in ascending order."""
        numbers = [number for number in self._numbers(fault, layers, parameters) if end is None or number < end]
        if not numbers:
            return {}
        try:
            return self._edits_at(numbers, fault, parameters)
        except NotApplicable:
            if layers is not None and len(layers) == 1:
                raise
            return self._where_it_applies(numbers, fault, parameters)

    def _where_it_applies(self, numbers: Sequence[int], fault: Fault, parameters: Parameters) -> dict[int, tuple[Step, ...]]:
        """The edits without the layers in which the fault has no place, as in models that alternate attention and recurrent layers.

        Raises:
            NotApplicable: no layer has a place for it, or a step outside the layers has none.
        """
        by_layer: dict[int | None, list[int]] = {None: []}
        for number in numbers:
            by_layer.setdefault(layer_near(self.steps[number]), []).append(number)
        edits_of = self._edits_at(by_layer.pop(None), fault, parameters)
        reason: NotApplicable | None = None
        for of_layer in by_layer.values():
            try:
                edits_of |= self._edits_at(of_layer, fault, parameters)
            except NotApplicable as error:
                reason = error
        if not edits_of and reason is not None:
            raise reason
        return dict(sorted(edits_of.items()))

    def _edits_at(self, numbers: Sequence[int], fault: Fault, parameters: Parameters) -> dict[int, tuple[Step, ...]]:
        edits_of: dict[int, tuple[Step, ...]] = {}
        rest = self._without_kinds(parameters)
        for number in numbers:
            step = self.steps[number]
            changed = self._changed_step(fault, number, parameters, rest)
            if changed:
                edits_of[number] = changed
                if not alike(changed, step):
                    self._check(changed, number, edits_of)
        return edits_of if len(edits_of) < 2 else dict(sorted(edits_of.items()))

    def _changed_step(self, fault: Fault, number: int, parameters: Parameters, rest: str) -> tuple[Step, ...]:
        """The replacement of a step; empty if the fault leaves it as it is. `rest` is `_without_kinds` of the parameters.
        Variants of a fault that differ only in other steps get the same object.

        Raises:
            NotApplicable: the model does not allow it there.
        """
        without = (fault.change, number, rest)
        known = self._changed.get(without)
        if known is None:
            with_at = (*without, parameters.get(AT))
            known = self._changed.get(with_at)
        if known is None:
            asked = _Asked(parameters)
            known = self._change(fault, number, asked)
            if len(self._changed) >= _KEPT:
                self._changed.clear()
            self._changed[with_at if asked.at else without] = known
        if isinstance(known, str):
            raise NotApplicable(known)
        return known

    def _change(self, fault: Fault, number: int, parameters: Parameters) -> tuple[Step, ...] | str:
        step = self.steps[number]
        twin = self._twins.get(number, step)
        of_twin = twin is not step and set(kinds_of(step)).isdisjoint(parameters.get(AT, fault.kinds))
        try:
            changed = fault.change(twin if of_twin else step, self.right, parameters)
        except NotApplicable as error:
            return str(error)
        if of_twin:
            return (replace(changed, makes=step.makes),) if isinstance(changed, Step) and changed is not twin else ()
        if changed is step or changed == step:
            return ()
        return (changed,) if isinstance(changed, Step) else tuple(changed)

    def _check(self, changed: Sequence[Step], number: int, planted: Mapping[int, Sequence[Step]]) -> None:
        """Raise NotApplicable if the changed steps cannot be computed at that number, as when two faults change the same step.

        `planted` holds the other changes; values that they add are known to the steps after them.
        """
        new_names = {step.makes for place, steps in planted.items() if place < number and len(steps) > 1 for step in steps}
        for step in changed:
            if not takes(step.op, len(step.reads) + len(step.weights), frozenset(step.params)):
                raise NotApplicable(f"{step.makes}: another fault has changed the same operation")
            for name in step.names:
                if name in new_names or self.order.get(name, number) < number:
                    continue
                if name in self.order or not (
                    name in GIVEN or name.startswith(ENCODER)
                ):  # a decoder is given what its encoder makes
                    raise NotApplicable(f"{step.makes} would read {name} before it is computed")
            new_names.add(step.makes)

    def _without_kinds(self, parameters: Parameters) -> str:
        """A fault's parameters without the kinds of step in which it is planted; a search plants the same ones in many layers."""
        known = self._rest.get(id(parameters))
        if known is None or known[0] is not parameters:
            if len(self._rest) >= _KEPT:
                self._rest.clear()
            known = parameters, repr([(name, value) for name, value in parameters.items() if name != AT])
            self._rest[id(parameters)] = known
        return known[1]

    def _numbers(self, fault: Fault, layers: Collection[int] | None, parameters: Parameters) -> Sequence[int]:
        """The numbers of the steps that a fault may change, by kind; known once for all faults of the same place."""
        kinds: tuple[str, ...] = tuple(parameters.get(AT, fault.kinds))
        place = kinds, None if layers is None else tuple(layers)
        known = self._numbers_at.get(place)
        if known is None:
            wanted = (None, *((_ANY,) if layers is None else layers))
            known = tuple(number for kind in kinds for layer in wanted for number in self._places.get((kind, layer), ()))
            self._numbers_at[place] = known
        return known

    def begin(self, fault: Fault, layers: Collection[int] | None, parameters: Parameters) -> int:
        """The number of the first step that this fault may change; the number of steps if there is none."""
        place = tuple(parameters.get(AT, fault.kinds)), None if layers is None else tuple(layers)
        if place not in self._begins:
            self._begins[place] = min(self._numbers(fault, layers, parameters), default=len(self.steps))
        return self._begins[place]

    def changes_by(self, fault: Fault, parameters: Parameters, last: int, after: int = -1) -> bool:
        """Whether this fault in all layers changes a step up to that number (after another one): it may really change only those in
        layers with a window, or with experts."""
        if fault.shows is not None:
            return self.begin(fault, None, parameters) <= last
        rest = self._without_kinds(parameters)
        numbers = (number for number in self._numbers(fault, None, parameters) if after < number <= last)
        return any(self._is_changed(fault, number, parameters, rest) for number in numbers)

    def _is_changed(self, fault: Fault, number: int, parameters: Parameters, rest: str) -> bool:
        """Whether a fault changes a step; the layer may have no place for it."""
        try:
            return bool(self._changed_step(fault, number, parameters, rest))
        except NotApplicable:
            return False

    def of(self, fault: Fault, layers: Collection[int] | None, parameters: Parameters) -> list[Step]:
        """The steps with this fault; see `plant`."""
        new: Mapping[int, Sequence[Step]] = {}
        shown: list[Step] = []
        if fault.shows is None:
            new = self.edits(fault, layers, parameters)
        else:
            for name in (self.steps[number].makes for number in self._numbers(fault, layers, parameters)):
                faulty_value = (
                    fault.shows(name, self.right, parameters) if self._recorded is None or name in self._recorded else None
                )
                shown += [] if faulty_value is None else [faulty_value]
        if not new and not shown:
            raise NotApplicable(f"{fault.name} changes none of these steps")
        result: list[Step] = []
        start = 0
        for number, changed in new.items():
            result += [*self.steps[start:number], *changed]
            start = number + 1
        return [*result, *self.steps[start:], *shown]


def plant(steps: Sequence[Step], fault: Fault, layers: Collection[int] | None = None, **parameters: Any) -> list[Step]:
    """The steps of an engine that has this fault, in the given layers or in all of them.

    Parameters that are not given take the first value of the fault's own list.

    Raises:
        NotApplicable: the fault changes none of these steps, or the model does not allow it.
    """
    planting = Planting(steps)
    return planting.of(fault, layers, (fault.variants(planting.right) or [{}])[0] | parameters)


def as_recorded(steps: Sequence[Step]) -> list[Step]:
    """The same steps, renamed so that running them writes the faulty dump: what a dump shows for a point has the point's own name.

    The value that the engine itself computes for such a point, and continues with, gets a name that ends in "!".
    """
    shown = {step.makes.removeprefix(SEEN) for step in steps if step.makes.startswith(SEEN)}
    if not shown:
        return list(steps)  # the same objects: what is known of the steps before a change is known of these

    def name(read: Read) -> Read:
        return read_as(read, name_of(read) + "!") if name_of(read) in shown else read

    return [
        replace(
            step,
            makes=step.makes.removeprefix(SEEN) if step.makes.startswith(SEEN) else str(name(step.makes)),
            reads=tuple(name(read) for read in step.reads),
        )
        for step in steps
    ]
