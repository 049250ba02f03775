"""One forward pass: each operation is computed from the inputs that it really had, and the result is compared with the recorded one."""

from collections import ChainMap, Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.errors import ModelError
from checkpoints.points import parse
from engine.graph import POSITIONS, TOKENS, Step, compute, name_of, viewed
from engine.replay.precision import ROUNDINGS, each
from engine.replay.proof import rounds_activations

from ..diff.readings.rounding import type_of
from ..laws.heads import heads_of
from .elements import least_energy, sampled_error
from .epsilons import judge_epsilon
from .held import Held, errors_beside, errors_beyond, nearer, without_numbers
from .inputs import Inputs, UnknownInput, as_subject, inputs_named, reads_rows_alone
from .judging import NORMS, NOT_FINITE, Judging
from .looks import OF_THE_WEIGHT
from .numbers import in_words
from .own_rounding import within_own_rounding
from .routing import choice_in_layer, other_order, routing_error
from .values import CACHED, RecordedValue, rows_at


class JudgedPass:
    """One forward pass while it is being judged."""

    def __init__(self, judging: Judging, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        self._judging, self._weights, self._memory = judging, judging.weights, judging.memory
        self._positions = positions
        self._programs = [definition.of(len(positions)) for definition in judging.definitions]
        self._program = self._programs[0]
        self._live = {**judging.given, TOKENS: RecordedValue(tokens, positions), POSITIONS: RecordedValue(positions, positions)}
        self._memory.past[POSITIONS].append(self._live[POSITIONS])
        self._inputs = Inputs(self._program, self._weights, self._memory, positions, self._live)
        self._right: dict[str, RecordedValue] = {}  # what readers may have read in place of a record
        self._states: dict[str, NDArray[np.float32] | None] = {}

    def run(self, arriving: Iterable[tuple[str, RecordedValue]]) -> None:
        """Take each step when the last value that it needs has come, and drop values that nothing needs any more."""
        program = self._program
        steps = [*program.carried, *program.judged]  # rows of a cache come before the step that reads them
        needed = {step.makes: program.needs(step) | (set() if step.inner else {step.makes}) for step in steps}
        users = Counter(name for names in needed.values() for name in names)
        waiting = {step.makes: step for step in steps}
        came: set[str] = set()
        for step in [step for step in steps if not needed[step.makes]]:
            self._take(waiting.pop(step.makes))
        readers: dict[str, list[str]] = defaultdict(list)
        for makes, names in needed.items():
            for name in names:
                readers[name].append(makes)
        for name, value in arriving:
            if name not in users:
                continue
            came.add(name)
            self._live[name] = value
            if name in program.remembered:
                self._memory.past[name].append(value)
            for makes in readers[name]:
                if makes in waiting and needed[makes] <= self._live.keys():
                    self._take(waiting.pop(makes))
                    users.subtract(needed[makes])
            for used in [used for used in self._live if used in users and users[used] <= 0]:
                del self._live[used]
                self._right.pop(used, None)
        for step in waiting.values():
            self._lacks(step, sorted(needed[step.makes] - came))
        self._memory.states.update(self._states)
        self._memory.passes += 1

    def _take(self, step: Step) -> None:
        """Judge an operation, or keep what a later pass reads."""
        try:
            if not step.inner:
                self._judge(step)
                self._inputs.done_with(step)
                return
            value = self._inputs.computed(step)
        except UnknownInput as error:
            if step.inner:
                self._states[step.makes] = None
            else:
                self._judging.records[step.makes].reason = str(error)
            return
        if step.makes in self._program.remembered:
            self._memory.past[step.makes].append(RecordedValue(value, self._positions))
        self._states[step.makes] = value

    def _lacks(self, step: Step, names: Sequence[str]) -> None:
        """Note which inputs of a step were not recorded."""
        if step.inner:
            self._states[step.makes] = None
            return
        output = "its output was not recorded as a whole"
        self._judging.records[step.makes].reason = (
            output if step.makes in names else f"{as_subject(names)} not recorded as a whole"
        )

    def _judge(self, step: Step) -> None:
        """Compare a step's recorded value with the one that follows from its inputs.

        Raises:
            UnknownInput: an input is not known at the positions of the output.
        """
        held = self._nearest(step)
        record = self._judging.records[step.makes]
        record.passes += 1
        definitions = self._definitions(step)
        if held.rounds and held.errors.max() <= self._judging.limit_of(step):
            record.unrounded = max(record.unrounded or 0.0, held.unrounded)
        self._note(step, definitions[-1], held)
        if step.op in NORMS and not held.pairs:
            judge_epsilon(self._judging, step, held, self._judging.limit_of(step))
        if self._judging.sample:
            sampled = [sampled_error(definition, held.inputs, held.dumped, self._weights) for definition in definitions]
            if measured := [error for error in sampled if error is not None]:
                record.sampled = max(record.sampled or 0.0, min(measured))

    def _nearest(self, step: Step) -> Held:
        """A step's recorded value beside what follows from the records of its inputs or, if it does not, from their right values."""
        others = {name: self._right[name] for name in self._right if name in self._program.needs(step)}
        limit = self._judging.limit_of(step)
        try:
            held = self._held(step, self._inputs)
        except UnknownInput:
            if (read := self._with_others(step, others)) is None:
                raise
            return read
        if not held.agrees(limit) or held.unknown:
            return self._with_others(step, others, float(held.errors.max())) or self._in_other_pairs(step, held) or held
        if others:
            held = self._weighed(step, held, others)
        if (routing := self._program.routing.get(step.makes)) and held.ours.shape == held.dumped.shape:
            order = other_order(routing.used, held.ours, held.dumped)
            if order.size == self._live[step.makes].data.size:
                self._right[step.makes] = self._in_place(step.makes, order)
        return held

    def _weighed(self, step: Step, held: Held, others: Mapping[str, RecordedValue]) -> Held:
        """A step that agrees with the records of its inputs: evidence for them, unless it agrees with other values as well."""
        records = self._judging.records
        choices = [name for name in others if name in self._program.routing and not records[name].wrong]
        for name in choices:
            records[name].read_by[step.makes] = None
        others = {name: value for name, value in others.items() if name not in choices}
        paired = {name: value for name, value in others.items() if records[name].pairs}
        if either := self._agreeing(step, self._held_by(step, paired)) if paired else None:
            self._deny(step, paired)  # scores of queries and keys that are both in another order are the same
            return replace(either, as_recorded=0.0) if either.pairs else held
        instead = self._held_by(step, others) if others else None
        if instead is None or not instead.agrees(self._judging.limit_of(step)):
            for name in others:
                records[name].read_by[step.makes] = None
            return held
        if type_of(held.dumped) and instead.ours.size == self._live[step.makes].data.size:
            # Both were rounded, as a cache's rows are with the values that it keeps: those who read it may have read either.
            self._right[step.makes] = self._in_place(step.makes, instead.ours)
        return instead if held.lower else held

    def _definitions(self, step: Step) -> list[Step]:
        """The step in each right definition, each only once."""
        every = [program.producers[step.makes] for program in self._programs]
        return [
            definition for number, definition in enumerate(every) if not any(definition is other for other in every[:number])
        ]

    def _held(self, step: Step, source: Inputs) -> Held:
        """A step's recorded value, and the one that the nearest definition makes from its inputs."""
        inputs, dumped, positions = self._aligned(step, source)
        first = self._program.producers[step.makes]
        routing = self._program.routing.get(step.makes)
        best: Held | None = None
        in_type: Held | None = None
        limit, least = self._judging.limit_of(step), least_energy(first, inputs, positions, self._weights)
        stored = "" if routing is not None else type_of(dumped)
        tried, within = list[list[Step]](), ""
        for program, definition_of in zip(self._programs, self._judging.definitions, strict=True):
            way = program.way(step.makes)  # definitions may also differ between the recorded values and the step
            if way in tried:
                continue
            definition = way[0]
            if tried:
                inputs = self._aligned(definition, source.by(program))[0]
            tried.append(way)
            ours = self._computed(definition, inputs)
            reason = ""
            if routing is not None:
                ordered: NDArray[np.float32] = viewed(routing.ordering.reads[0], source.of(routing.ordering, positions)[0])
                errors, reason = routing_error(routing.used, ordered, ours, dumped)
            else:
                bound = np.inf if definition_of.arithmetic else limit
                errors = errors_beside(step.makes, ours, dumped, positions, least, bound)
                if not definition_of.arithmetic:
                    wide = partial(self._in_float64, definition, source if program is self._program else source.by(program))
                    errors = within_own_rounding(way, ours, wide, positions, errors, limit, least)
            unknown = without_numbers(inputs, len(errors))
            if unknown.all():
                raise UnknownInput(NOT_FINITE)
            errors = np.where(unknown, 0.0, errors)
            if best is None or nearer(errors, best.errors, limit, lower=bool(definition_of.arithmetic)):
                rounds = rounds_activations(definition) and not rounds_activations(first)
                by_first = float(errors.max()) if best is None else best.unrounded
                in_mode = best.in_mode if best is not None and definition_of.arithmetic else ours
                best = Held(inputs, dumped, ours, positions, errors, reason, rounds, by_first, bool(unknown.any()))
                best = replace(best, arithmetic=definition_of.arithmetic, in_mode=in_mode)
            if not within and definition_of.arithmetic in ROUNDINGS and step.makes in self._judging.stretches:
                kind = definition_of.arithmetic
                operands = partial(self._with_rounded_operands, step, source, kind)
                heads = heads_of(self._program.producers, step.makes)
                within = kind if best.rounded_within(step.makes, ours, errors, limit, operands, heads) else ""
            if best.errors.max() <= limit:
                return best
            if in_type is None and stored:
                beyond = errors_beyond(stored, step.makes, ours, dumped, positions, least)
                if not (beyond[~unknown] > limit).any():
                    in_type = replace(best, ours=ours, errors=errors, lower=stored, arithmetic=definition_of.arithmetic)
        assert best is not None
        return in_type or replace(best, within=within)

    def _with_others(self, step: Step, others: Mapping[str, RecordedValue], error: float = np.inf) -> Held | None:
        """A step that does not follow from the records of its inputs, compared using other values of those; None if it is wrong even then.

        An operation that is right then really had these values: the record of its input is wrong. One such input is tried at a time,
        then all together. `error` is that by the records.
        """
        for names in [*([name] for name in others), *([list(others)] if len(others) > 1 else [])]:
            held = self._agreeing(step, self._held_by(step, {name: others[name] for name in names}))
            if held is None:
                continue
            self._deny(step, {name: others[name] for name in names})
            for name in names:
                if name in self._program.routing and not self._judging.records[name].wrong:
                    self._judging.records[step.makes].reordered[name] = error
            return held
        return None

    def _agreeing(self, step: Step, held: Held | None) -> Held | None:
        """A compared step if it agrees, as it was recorded or with RoPE's pairs in another order; else None."""
        if held is None or held.unknown:
            return None
        return held if held.agrees(self._judging.limit_of(step)) else self._in_other_pairs(step, held)

    def _in_other_pairs(self, step: Step, held: Held) -> Held | None:
        return held.in_other_pairs(step.makes, heads_of(self._program.producers, step.makes), self._judging.limit_of(step))

    def _deny(self, step: Step, others: Mapping[str, RecordedValue]) -> None:
        """Note that a step read these values, and not the recorded ones."""
        for name, value in others.items():
            self._judging.records[name].denied_by[step.makes] = None
            if name in self._memory.past:
                self._memory.past[name][-1] = value  # later passes read it, too

    def _held_by(self, step: Step, others: Mapping[str, RecordedValue]) -> Held | None:
        """A step compared using other values of some inputs than the recorded ones; None if an input is not known."""
        past = {name: [*self._memory.past[name][:-1], value] for name, value in others.items() if name in self._memory.past}
        memory = replace(self._memory, past={**self._memory.past, **past})
        live = ChainMap(dict(others), self._live)
        try:
            return self._held(step, Inputs(self._program, self._weights, memory, self._positions, live))
        except UnknownInput:
            return None

    def _in_place(self, name: str, data: NDArray[np.float32]) -> RecordedValue:
        return replace(self._live[name], data=data.reshape(self._live[name].data.shape))

    def _computed(self, step: Step, inputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        try:
            with np.errstate(all="ignore"):  # a foreign engine's inputs may be anything
                computed: NDArray[np.float32] = compute(step, inputs, self._weights)
        except (ValueError, IndexError):
            if choice := next((name for name in self._program.needs(step) if name in self._program.routing), ""):
                raise UnknownInput(f"{choice} was recorded with places that nothing has") from None
            wrong = {name for name in self._program.routing if self._judging.records[name].wrong}
            if choice := choice_in_layer(wrong, step):
                raise UnknownInput(f"{choice} is wrong, and its inputs have another number of values") from None
            shapes = ", ".join(str(list(given.shape)) for given in inputs)
            raise ModelError(f"{step.makes} cannot be computed from {shapes}.", "Is the dump of this model?") from None
        return computed

    def _with_rounded_operands(self, step: Step, source: Inputs, kind: str) -> NDArray[np.float32]:
        """A step's value if it rounds those of its operands that do not follow from the operations judged together with it."""
        first, unseen = self._program.producers[step.makes], set(self._judging.stretches[step.makes])
        inputs = [
            given if unseen & {before.makes for before in self._program.way(name_of(read))} else each(ROUNDINGS[kind], given)
            for given, read in zip(self._aligned(first, source)[0], first.reads, strict=True)
        ]
        return self._computed(first, inputs)

    def _in_float64(self, step: Step, source: Inputs) -> NDArray[Any]:
        return self._computed(step, self._aligned(step, source.widened())[0])

    def _note(self, step: Step, definition: Step, held: Held) -> None:
        """Keep the worst row of all passes, and what a wrong one looks like."""
        record, limit = self._judging.records[step.makes], self._judging.limit_of(step)
        errors, positions = held.errors, held.positions
        worst = int(np.argmax(errors))
        nmse = float(errors[worst])
        if (nmse > limit or held.pairs) and held.ours.size == self._live[step.makes].data.size:
            self._right[step.makes] = self._in_place(step.makes, held.ours)
        record.pairs, record.as_recorded = record.pairs or held.pairs, max(record.as_recorded, held.as_recorded)
        record.lower = held.lower if nmse > limit and held.lower else record.lower
        if held.arithmetic:
            record.arithmetics[held.arithmetic] = None
        if nmse > limit and not held.lower:
            record.note_wrong(held, limit)
        if nmse <= record.nmse:
            return
        record.nmse = nmse
        record.position = int(positions[worst]) if len(positions) == len(errors) else worst + int(positions[0])
        record.reason = held.reason
        if nmse > limit:
            wrong = int((errors > limit).sum())
            where = "" if wrong == len(errors) else f"{wrong} of {len(errors)} positions"
            moved = held.of_other_positions(limit) if where else ""
            look = held.reason or moved or in_words(definition, self._program.producers, held, self._weights, limit)
            look = "its weight is right for the others" if where and look == OF_THE_WEIGHT else look
            record.reason = "; ".join(part for part in (where, look) if part)

    def _aligned(self, step: Step, source: Inputs) -> tuple[list[NDArray[np.float32]], NDArray[np.float32], NDArray[np.int64]]:
        """The step's inputs and output at the positions that all of them have.

        Raises:
            UnknownInput: they have none in common, an operation over all positions lacks some, or a history has gaps.
        """
        output = self._live[step.makes]
        cached = parse(step.makes).kind in CACHED
        if cached or step.axis is None:  # a pass has the latter only once
            return source.of(step), output.data, output.positions if cached else output.positions[-1:]
        common = output.positions
        for name in inputs_named(step):
            if name in self._live and parse(name).kind not in CACHED:
                common = np.intersect1d(common, self._live[name].positions)
        if not len(common):
            raise UnknownInput("its inputs and its output were recorded at different positions")
        if len(common) != len(self._positions) and not reads_rows_alone(step):
            raise UnknownInput("its inputs or its output were not recorded at every position of the pass")
        return source.of(step, common), rows_at(step.makes, output, common), common
