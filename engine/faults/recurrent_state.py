"""Faults of the state of recurrent layers: it is emptied before each pass, or left over from another sequence."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..ggml_ops.params import on_host
from ..graph import PASSES, Read, State, Step, View, name_of, read_as
from ..inapplicable import NotApplicable
from ..lift.node import Operand
from .base import AT, COPY, Fault, Parameters, Steps, kind_of
from .edits import ggml

_STATES = {"GATED_DELTA_NET": 5, "SSM_SCAN": 0, "RWKV_WKV6": 5, "RWKV_WKV7": 6}  # which operand is the state
_SCANS = tuple(_STATES)
_CONVOLUTION = ("SSM_CONV",)
_JOINS = ("CONCAT",)  # a convolution's inputs: what is left from the last pass, then this pass's


_FAR = 5  # steps without weights from a scan to the norm of what it makes: D · x and the gate lie between


def scan_behind(step: Step, right: Steps) -> Step | None:
    """The scan that a value is made of by steps without weights, but for the step's own; None if there is none."""
    names = set(step.names)
    for _ in range(_FAR):
        found = [right[name] for name in names if name in right]
        scan = next((other for other in found if ggml(other, *_SCANS)), None)
        if scan is not None:
            return scan
        names = {name for other in found if not other.weights for name in other.names}
    return None


def row_norms_of_scans(right: Steps) -> tuple[str, ...]:
    """The kinds of a model's norms of whole rows that scans make."""
    rows = (step for step in right.values() if step.op is ops.rms_norm and step.params.get("heads", 1) == 1)
    return tuple(dict.fromkeys(kind_of(step) for step in rows if scan_behind(step, right) is not None))


def heads_of_scan(scan: Step) -> int:
    """How many heads a scan has, by the state's shape [.., H, rows, columns]."""
    return int(scan.params["operands"][_STATES[scan.op.name]].shape[1].fixed)  # type: ignore[attr-defined]


class _ByPass(Struct, frozen=True):
    """An operation computed pass by pass, each from an empty state. `at` is the number of the input that holds `passes`."""

    op: Callable[..., Array]
    at: int

    def passes(self, inputs: Sequence[Any]) -> tuple[list[Any], list[tuple[int, int, int]]]:
        """The operation's own inputs, and for each pass its number, its first row and the end of its rows (exclusive)."""
        passes = inputs[self.at]
        own = [value for number, value in enumerate(inputs) if number != self.at]
        numbers, starts = np.unique(on_host(passes), return_index=True)
        ends = [*starts[1:].tolist(), len(passes)]
        return own, list(zip(numbers.tolist(), starts.tolist(), ends, strict=True))


class _ScanByPass(_ByPass, frozen=True):
    """A scan, whose result is the rows, then the state that it leaves."""

    state: int

    def __call__(self, *inputs: Any, operands: tuple[Operand | None, ...], **params: Any) -> Array:
        """All rows, then the last pass's state."""
        own, each = self.passes(inputs)
        rows, left = [], None
        for number, begin, end in each:
            part = [_rows(value, place, operands, begin, end) for place, value in enumerate(own)]
            if number > 0:
                part[self.state] = part[self.state] * 0
            scanned = self.op(*part, operands=operands, **params)
            size = own[self.state].size
            rows.append(scanned.reshape(-1)[:-size])
            left = (scanned.reshape(-1)[-size:], scanned)
        assert left is not None
        flat = module_of(left[0]).concatenate([*rows, left[0]])
        return flat.reshape(_joined(left[1].shape, flat.size))


def _joined(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The shape of all rows together, in which the first dimension that is not 1 grows with them."""
    place = next((place for place, n in enumerate(shape) if n != 1), len(shape) - 1)
    rest = int(np.prod(shape[place + 1 :], dtype=np.int64))
    return (*shape[:place], size // rest, *shape[place + 1 :])


def _rows(value: Any, place: int, operands: tuple[Operand | None, ...], begin: int, end: int) -> Any:
    """The rows of one pass, if the input has rows; else the whole input."""
    operand = next((operand_at for operand_at in operands if operand_at is not None and operand_at.index == place), None)
    axis = None if operand is None else next((axis for axis, size in enumerate(operand.whole) if size.tokens), None)
    return value if axis is None else value[(slice(None),) * axis + (slice(begin, end),)]


class _ConvolutionByPass(_ByPass, frozen=True):
    """A convolution over [·, T + taps − 1], whose first columns come from the last pass."""

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        """All rows."""
        own, each = self.passes(inputs)
        x, weight, *rest = own
        before = weight.shape[-1] - 1
        outputs = []
        for number, begin, end in each:
            part = x[..., begin : end + before].copy()
            if number > 0:
                part[..., :before] = 0
            outputs.append(self.op(part, weight, *rest, **params))
        return module_of(x).concatenate(outputs)


def _not_carried(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if ggml(step, *_CONVOLUTION):
        return replace(step, op=_ConvolutionByPass(step.op, len(step.reads)), reads=(*step.reads, PASSES))
    if not ggml(step, *_SCANS):
        raise NotApplicable(f"{step.makes} keeps no state")
    state = step.params["operands"][_STATES[step.op.name]].index  # type: ignore[attr-defined]
    return replace(step, op=_ScanByPass(step.op, len(step.reads), state), reads=(*step.reads, PASSES))


def _left_behind(step: Step, right: Steps, _parameters: Parameters) -> Step | Sequence[Step]:
    """The whole model is run twice; the second run starts with the states that the first one left instead of zeros."""
    states = {
        name: read.of for name, other in right.items() for read in other.reads if isinstance(read, State) and name != read.of
    }
    if not states:
        raise NotApplicable("the model keeps no state")
    if step.makes == next(iter(right)):
        return [*_copies(right, set(states.values())), step]
    if not any(name_of(read) in states for read in step.reads if isinstance(read, View)):
        return step
    reads = tuple(_of_the_copy(read, states) for read in step.reads)
    return replace(step, reads=reads)


def _of_the_copy(read: Read, states: dict[str, str]) -> Read:
    return read_as(read, states[name_of(read)] + COPY) if isinstance(read, View) and name_of(read) in states else read


def _copies(right: Steps, ends: set[str]) -> list[Step]:
    """Copies of the steps that lead to some values, in their order."""
    needed: set[str] = set()
    waiting = list(ends)
    while waiting:
        name = waiting.pop()
        if name in right and name not in needed:
            needed.add(name)
            waiting += right[name].names
    return [
        replace(
            other,
            makes=name + COPY,
            inner=True,
            reads=tuple(_named_as_copied(read, needed) for read in other.reads),
        )
        for name, other in right.items()
        if name in needed
    ]


def _named_as_copied(read: Read, copied: set[str]) -> Read:
    return read_as(read, name_of(read) + COPY) if name_of(read) in copied and not isinstance(read, State) else read


FAULTS = (
    Fault(
        name="state-not-carried",
        kinds=(*_SCANS, *_CONVOLUTION),
        change=_not_carried,
        what="each forward pass begins with an empty state, in {at}",
        symptom="prefill right, decode wrong from its first step on",
        fix="keep the scan's state and the convolution's last inputs from pass to pass",
        seen="states that are allocated again for each batch; a convolution that pads with zeros in decode",
        parameters={AT: ((*_SCANS, *_CONVOLUTION), _SCANS, _CONVOLUTION)},
        says={(*_SCANS, *_CONVOLUTION): "scans and convolutions", _SCANS: "scans", _CONVOLUTION: "convolutions"},
    ),
    Fault(
        name="state-of-other-sequence",
        kinds=("embd", *_JOINS, *_SCANS),
        change=_left_behind,
        what="the prompt begins with the state left by an earlier run of the same prompt, not with an empty one",
        symptom="wrong from position 0 on in layers with a state, right in a fresh process",
        fix="set states and convolutions to zero when a sequence begins",
        seen="warm-up runs and second requests of servers",
        whole=True,
        once=True,
    ),
)
