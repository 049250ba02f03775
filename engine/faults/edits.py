"""Changes of steps that several groups of faults share: an operation left out, its result changed, a parameter of ggml's replaced."""

import struct
from collections.abc import Callable, Mapping
from inspect import Signature, signature
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ..backend import Array
from ..graph import Read, Step, name_of
from ..inapplicable import NotApplicable
from ..lift.node import GgmlOperation
from .base import Steps, read_of

SIGMOID, SILU, SOFTPLUS = 7, 10, 15  # enum ggml_unary_op


def copied(x: Array) -> Array:
    """The value, unchanged."""
    return x.copy()


def only(step: Step, read: Read) -> Step:
    """A step that only passes on one of the values that it reads."""
    return replace(step, op=copied, reads=(read,), weights=(), params={})


def left_out(step: Step) -> Step:
    """The step of a ggml operation as one that passes on its only operand in its own layout: a scale by 1."""
    params = replace(step.params["params"], values=struct.unpack("<2i", struct.pack("<2f", 1.0, 0.0)))
    return replace(step, op=GgmlOperation("SCALE"), params={**step.params, "params": params})


class HandsOn(Struct, frozen=True):
    """An operation that wraps another one and passes it all operands: it takes the same arguments."""

    op: Callable[..., Array]

    @property
    def __signature__(self) -> Signature:
        return signature(self.op)


class Then(HandsOn, frozen=True):
    """An operation whose result is changed afterwards."""

    change: Callable[[Array], Array]

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        """The changed result."""
        return self.change(self.op(*inputs, **params))


class WithInput(Struct, frozen=True):
    """An operation with one of its inputs changed by `change`, which is given that input and any further ones.

    `at` is the number of the input, `besides` the numbers of inputs that only `change` reads.
    """

    op: Callable[..., Array]
    at: int
    change: Callable[..., Array]
    besides: tuple[int, ...] = ()

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        """The operation's result with the changed input."""
        changed = list(inputs)
        changed[self.at] = self.change(inputs[self.at], *(inputs[number] for number in self.besides))
        return self.op(*[value for number, value in enumerate(changed) if number not in self.besides], **params)


def ggml(step: Step, *names: str) -> bool:
    """Whether the step is one of these ggml operations, as a step of ggml's own and not of `engine.ops`."""
    return isinstance(step.op, GgmlOperation) and step.op.name in names


def require(step: Step, *names: str) -> Step:
    """The step, if it is one of these operations of ggml's.

    Raises:
        NotApplicable: the step is another operation.
    """
    if not ggml(step, *names):
        raise NotApplicable(f"{step.makes} is not {' or '.join(names)}")
    return step


def integer(step: Step, index: int) -> int:
    """An integer of ggml's parameters of a step."""
    return int(step.params["params"].int(index))


def number(step: Step, index: int) -> float:
    """A float of ggml's parameters of a step."""
    return float(step.params["params"].float(index))


def with_values(step: Step, changes: Mapping[int, int | float]) -> Step:
    """The step with some of ggml's parameters replaced: a float by its bits."""
    params = step.params["params"]
    values = list(params.values)
    for index, value in changes.items():
        values[index] = struct.unpack("<i", struct.pack("<f", value))[0] if isinstance(value, float) else value
    return replace(step, params={**step.params, "params": replace(params, values=tuple(values))})


def maker(step: Step, right: Steps, read: int = 0) -> Step:
    """The step that makes one of the values that a step reads.

    Raises:
        NotApplicable: no step makes it.
    """
    name = name_of(read_of(step, read))
    if name not in right:
        raise NotApplicable(f"no step makes {name}")
    return right[name]
