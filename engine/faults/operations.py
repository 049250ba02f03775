"""Faults that any operation can have, whatever the architecture: a ggml operation with another function of one value, or with one of
its two operands left out; an operation with a point whose result was never written.
"""

import re
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from checkpoints.points import parse

from .. import ops
from ..backend import Array, module_of
from ..ggml_ops.activations import UNARY_KINDS
from ..graph import Read, Step, View
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, Values, kind_of
from .edits import HandsOn, Then, ggml, integer, left_out, with_values

_FUNCTIONS = {
    "nothing": None,
    "sigmoid": 7,
    "SiLU": 10,
    "tanh": 4,
    "ReLU": 6,
    "GELU (tanh)": 8,
    "exp": 13,
    "softplus": 15,
}  # ggml_unary_op
_OF_ONE = ("UNARY", "SQR")
_OF_TWO = ("MUL", "SUB", "ADD")
# Sums and products that other entries know by what they are: residuals, branches, experts.
_KNOWN = ("embd", "ffn_inp", "l_out", "ffn_moe_weighted", "ffn_moe_out", "ffn_out")
_NONE = "an operation"  # stands for those of a model that is not known
_RESULTS = ("q", "k", "v", "kqv_out", "attn_out", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out", "ffn_moe_out", "ffn_shexp")
_FAR = 4  # steps without weights that are followed back to what an operation's operand was made with
_LAYER = re.compile(r"^blk\.\d+\.")


def _origin(name: str, right: Steps, far: int = _FAR) -> str:
    """The weights of the step that makes a value or, if it has none, of the nearest steps before it that have some.
    Names of steps are no help: unnamed steps are numbered within each layer, so that one operation may have different names in two
    layers.
    """
    step = right.get(name)
    if step is None:
        return name
    weights = [_LAYER.sub("", weight) for weight in step.weights if isinstance(weight, str)]
    if weights:
        return weights[0].removesuffix(".weight")
    return _origin(step.names[0], right, far - 1) if far and step.names else parse(name).kind


def _of_one(step: Step, right: Steps) -> str:
    """A name for an operation on one value, from its function and the weights behind that value; "" for any other operation."""
    if not ggml(step, *_OF_ONE) or step.inner:
        return ""
    what = UNARY_KINDS[integer(step, 0)].lower() if ggml(step, "UNARY") else "square"
    before = right.get(step.names[0])
    return f"{what}({(before and _of_one(before, right)) or _origin(step.names[0], right)})"


def _of_two(step: Step, right: Steps) -> str:
    """A name for the sum or product of two values, from the weights behind both; "" for any other operation."""
    if len(step.reads) != 2 or step.weights or not all(isinstance(read, str | View) for read in step.reads):
        return ""
    if not (step.op is ops.add or ggml(step, *_OF_TWO)) or step.inner or kind_of(step) in _KNOWN:
        return ""
    if step.op is ops.add and any(parse(name).layer != parse(step.makes).layer for name in step.names):
        return ""  # a residual
    sign = " · " if ggml(step, "MUL") else " − " if ggml(step, "SUB") else " + "
    origins = [_part_of(read, _origin(name, right)) for read, name in zip(step.reads, step.names, strict=True)]
    return "" if any(origin.startswith("state.") for origin in origins) else sign.join(origins)


def _part_of(read: Read, origin: str) -> str:
    """A name for what is read of a value: which of its elements, if it is one part of each row."""
    if not isinstance(read, View) or not (read.shape[-1].constant and read.offset.constant and read.whole[-1].constant):
        return origin
    width, begin = read.shape[-1].fixed, read.offset.fixed
    return f"{origin}[{begin}…{begin + width - 1}]" if begin + width <= read.whole[-1].fixed != width else origin


def _each(named: Callable[[Step, Steps], str]) -> Callable[[Steps], Values]:
    """The operations that a model has, each once; a placeholder if it has none."""
    return lambda right: (
        tuple(name for name in dict.fromkeys(named(step, right) for step in right.values()) if name) or (_NONE,)
    )


def _other_function(step: Step, right: Steps, parameters: Parameters) -> Step:
    number = _FUNCTIONS[parameters["function"]]
    if _of_one(step, right) != parameters["operation"]:
        return step
    if number is None:
        return left_out(step)
    if not ggml(step, "UNARY"):
        raise NotApplicable(f"{step.makes} is no other function")
    return with_values(step, {0: number})


class _Without(HandsOn, frozen=True):
    """A sum, difference or product of two operands that takes a number in place of one of them: 0, or 1 in a product.
    The one that is left must be as large as the other.
    """

    left: int
    number: float

    def __call__(self, *operands: Array, **params: Any) -> Array:
        """[T, n], [T, m] -> [T, n] or [T, m]."""
        if operands[self.left].size < operands[1 - self.left].size:
            raise NotApplicable("the operand is smaller than the result")
        kept = list(operands)
        kept[1 - self.left] = module_of(operands[0]).full_like(operands[1 - self.left], self.number)
        return self.op(*kept, **params)


def _one_operand(step: Step, right: Steps, parameters: Parameters) -> Step:
    if _of_two(step, right) != parameters["operation"]:
        return step
    left = ("second", "first").index(parameters["operand"])
    without = _Without(step.op, left, 1.0 if ggml(step, "MUL") else 0.0)
    return replace(step, op=Then(without, _negated) if left == 1 and ggml(step, "SUB") else without)


def _negated(value: Array) -> Array:
    return -value


def _unwritten(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return replace(step, op=Then(step.op, _nothing))


def _nothing(value: Array) -> Array:
    return value * 0


FAULTS = (
    Fault(
        name="result-unwritten",
        kinds=_RESULTS,
        change=_unwritten,
        what="nothing is written into the buffer of {at}: it is all zeros",
        symptom="exact zeros, or a block that adds nothing",
        fix="ask whether the kernel was launched and succeeded, and whether it writes what is read next, before it is read",
        seen="launches that fail without a word (too many threads, too much memory); a cache that is read before it is written",
        parameters={AT: tuple((kind,) for kind in _RESULTS)},
    ),
    Fault(
        name="function-of-other",
        kinds=_OF_ONE,
        change=_other_function,
        what="the outer function of {operation} is {function}",
        symptom="wrong from the first layer on that has this operation",
        fix="compare the operation with llama.cpp's graph: `parity model` lists it",
        seen="sigmoid for SiLU in gated norms; a convolution without SiLU; ReLU that is not squared; gates without their sigmoid",
        parameters={"function": tuple(_FUNCTIONS), "operation": _each(_of_one)},
        says={"nothing": "left out"},
    ),
    Fault(
        name="operand-left-out",
        kinds=(*_OF_TWO, "SUM"),
        change=_one_operand,
        what="{operation} is computed without its {operand} operand",
        symptom="wrong from the first layer on that has this operation",
        fix="compare the operation with llama.cpp's graph: `parity model` lists it",
        seen="gates, bonuses and mixes that only one generation of a family has",
        parameters={"operand": ("second", "first"), "operation": _each(_of_two)},
    ),
)
