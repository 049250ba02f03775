"""One operation of one layer at a time: computed from the inputs that it really had, and compared with its recorded output."""

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.isolate import NOT_OBSERVABLE, PROVEN, WRONG, Operation
from checkpoints.errors import ModelError
from checkpoints.points import parse
from checkpoints.printable import first_names
from engine.graph import Step

from .judging import NOT_FINITE, Judging, Record
from .one_pass import JudgedPass
from .values import RecordedValue

_LISTED = 3  # readers of a suspect record that are named


class Isolator(Judging, dict=True):
    """Takes values as they come and judges each step as soon as its inputs and its output are known."""

    @cached_property
    def steps(self) -> Sequence[Step]:
        """The model's operations, each once: those of a pass over several tokens, then those that only a single token's pass has."""
        several, single = self.definitions[0].programs
        named = {step.makes: step for step in (*single.judged, *several.judged)}
        order = dict.fromkeys([step.makes for step in (*several.judged, *single.judged)])
        return [named[name] for name in order]

    def run(
        self, tokens: NDArray[np.int64], positions: NDArray[np.int64], arriving: Iterable[tuple[str, RecordedValue]]
    ) -> None:
        """Judge one forward pass: its tokens and positions [T], and its values by point, in the order of computation."""
        JudgedPass(self, tokens, positions).run(arriving)

    def operations(self) -> list[Operation]:
        """The verdict on each step, in the order of the model."""
        return [self._operation(step) for step in self.steps]

    def proven(self) -> frozenset[str]:
        """Points that follow from their inputs, as far as they could be judged."""
        return frozenset(
            name
            for name, record in self.records.items()
            if record.nmse >= 0 and not record.wrong and not record.lower and (not record.pairs or self._settled(name))
        )

    def unknown(self) -> frozenset[str]:
        """Points whose inputs were not finite."""
        return frozenset(name for name, record in self.records.items() if record.nmse < 0 and record.reason == NOT_FINITE)

    def suspects(self) -> frozenset[str]:
        """Points that were recorded wrong: operations that read them had the right value."""
        return frozenset(name for name, record in self.records.items() if record.denied_by)

    def unless_of(self, suspects: Collection[str], operations: Sequence[Operation]) -> list[Operation]:
        """The operations; those that are wrong because of an input that was recorded wrong (`suspects`) are not observable."""
        programs = self.definitions[0].programs
        read = {step.makes: program.needs(step) & set(suspects) for program in programs for step in program.judged}
        return [
            replace(operation, status=NOT_OBSERVABLE, reason=f"the record of its input {min(inputs)} is suspect")
            if operation.status == WRONG and (inputs := read.get(operation.name))
            else operation
            for operation in operations
        ]

    def _operation(self, step: Step) -> Operation:
        point, record = parse(step.makes), self.records[step.makes]
        judged = Operation(point.kind, point.layer, NOT_OBSERVABLE, weight=self._weight(step), reason=record.reason)
        if record.nmse < 0:
            return judged
        status, reason = self._verdict(step.makes, record)
        if record.pairs and not record.wrong:
            return self._in_other_pairs(judged, record)
        misread = [name for name in record.reordered if not self._recorded_in_another_order(name)]
        return replace(
            judged,
            status=WRONG if misread else status,
            reason=self._other_order(misread[0]) if misread else reason,
            nmse=max([record.nmse, *(record.reordered[name] for name in misread)]),
            position=record.position,
            passes=record.passes,
            sampled=record.sampled,
        )

    def _verdict(self, name: str, record: Record) -> tuple[str, str]:
        """Whether an operation is right, and a sentence on it."""
        denied = listed_readers(record.denied_by)
        if record.wrong:
            return WRONG, self._together(name, record)
        if record.lower and record.denied_by and not record.read_by:
            return PROVEN, f"recorded rounded to {record.lower}: {denied} read the value before it was rounded"
        if record.lower:
            rounded = f"the right value rounded to {record.lower}"
            if not record.read_by and record.lower in self._recorders_types:
                return (
                    NOT_OBSERVABLE,
                    f"{rounded}, as the records of others are: nothing recorded shows whether it was computed so",
                )
            return WRONG, f"{rounded}: stored or computed in that type"
        if self._recorded_in_another_order(name):
            return PROVEN, f"recorded in another order than {denied} read it"
        return PROVEN, self._together(name, record)

    def _in_other_pairs(self, judged: Operation, record: Record) -> Operation:
        """The verdict on a right value in another order, which the record alone may have: then all readers agree with llama.cpp's order."""
        found = replace(judged, nmse=record.nmse, position=record.position, passes=record.passes, sampled=record.sampled)
        if self._settled(judged.name):
            reason = f"recorded as {record.pairs}: {listed_readers(record.denied_by)} agree with llama.cpp's order"
            return replace(found, status=PROVEN, reason=reason)
        if not record.as_recorded:
            return replace(found, status=PROVEN, reason="")
        reason = f"the right values stand in another order: {record.pairs}"
        return replace(found, status=WRONG, nmse=record.as_recorded, reason=reason)

    def recorded_otherwise(self) -> list[str]:
        """Points whose right values were recorded with RoPE's pairs in another order."""
        return [name for name, record in self.records.items() if record.pairs and not record.wrong and self._settled(name)]

    def _settled(self, name: str) -> bool:
        """Whether everything made from a value that was recorded in another order of RoPE's pairs had the right one, to the end."""
        record = self.records[name]
        if record.read_by or not record.denied_by:
            return False
        return all(not self.records[reader].pairs or self._settled(reader) for reader in record.denied_by)

    @property
    def _recorders_types(self) -> set[str]:
        """The lower types to which values were rounded in the record alone."""
        return {record.lower for record in self.records.values() if record.lower and record.denied_by and not record.read_by}

    def _recorded_in_another_order(self, name: str) -> bool:
        """Whether several operations read a choice in another order than the recorded one, and none in that."""
        record = self.records[name]
        return not record.wrong and not record.lower and len(record.denied_by) > 1 and not record.read_by

    def _other_order(self, name: str) -> str:
        """What a wrong operation is that reads a choice in another order."""
        readers = self.records[name].read_by
        than = (
            f"than {listed_readers(readers)}" if readers else "than it was recorded in (or the record alone has another order)"
        )
        return f"it reads {name} in another order {than}"

    def _together(self, name: str, record: Record) -> str:
        """What a wrong operation looks like, and which others it was judged together with."""
        others = self.stretches.get(name, ())
        if record.wrong and record.denied_by:
            readers = listed_readers(record.denied_by)
            agree = "agrees" if len(record.denied_by) == 1 else "agree"
            return (
                f"the record is suspect, not the operation: {readers} {agree} with the right value, not with the recorded one"
            )
        if not record.wrong or not others:
            return record.reason
        named = ", ".join(parse(other).kind for other in others)
        return "; ".join(part for part in (record.reason, f"this operation or an unrecorded one before it: {named}") if part)

    def _weight(self, step: Step) -> str:
        """The type of the weight that a step multiplies with, "" if it has none."""
        first = step.weights[0] if step.weights else None
        name = first if first is None or isinstance(first, str) else first.weight
        if name is None:
            return ""
        from gguf import GGMLQuantizationType

        try:
            return str(GGMLQuantizationType(self.weights.raw(name)[1]).name)
        except (KeyError, ValueError, ModelError):
            return ""


def listed_readers(names: Collection[str]) -> str:
    """The operations that read a value, the first of many."""
    return first_names(names, _LISTED)
