"""Faults of any operation that is ggml's own, whatever the architecture: another function of one value, one of two operands left out."""

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, Values, kind_of
from .edits import ggml, integer, left_out, require, with_values

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


def _kinds(right: Steps, *names: str) -> dict[str, None]:
    """The kinds of a model's steps of these operations of ggml's, in the order of computation."""
    return {kind_of(step): None for step in right.values() if ggml(step, *names) and not step.inner}


def _functions(right: Steps) -> Values:
    return tuple((kind,) for kind in _kinds(right, *_OF_ONE)) or (_OF_ONE,)


def _of_two_values(step: Step) -> bool:
    plain = len(step.reads) == 2 and not step.weights and all(isinstance(read, str) for read in step.reads)
    return plain and (step.op is ops.add or ggml(step, *_OF_TWO))


def _pairs(right: Steps) -> Values:
    kinds = {kind_of(step): None for step in right.values() if _of_two_values(step) and not step.inner}
    return tuple((kind,) for kind in kinds if kind not in _KNOWN) or (_OF_TWO,)


def _other_function(step: Step, _right: Steps, parameters: Parameters) -> Step:
    number = _FUNCTIONS[parameters["function"]]
    if number is None:
        return left_out(require(step, *_OF_ONE))
    if not ggml(step, "UNARY") or integer(step, 0) == number:
        raise NotApplicable(f"{step.makes} is no other function")
    return with_values(step, {0: number})


class _Handed(Struct, frozen=True):
    """One of two operands, which must be as large as the other."""

    place: int

    def __call__(self, x: Array, y: Array) -> Array:
        """[T, n], [T, m] -> [T, n] or [T, m]."""
        kept, other = (x, y) if self.place == 0 else (y, x)
        if kept.size < other.size:
            raise NotApplicable("the operand is smaller than the result")
        return kept.copy()


def _one_operand(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if not _of_two_values(step):
        raise NotApplicable(f"{step.makes} is no sum or product of two values")
    return replace(step, op=_Handed(("second", "first").index(parameters["operand"])), params={})


FAULTS = (
    Fault(
        name="function-of-other",
        kinds=_OF_ONE,
        change=_other_function,
        what="{at} applies {function}, which is not this model's function",
        symptom="wrong from the first layer on that has this operation",
        fix="compare the operation with llama.cpp's graph: `parity model` lists it",
        seen="sigmoid for SiLU in gated norms; a convolution without SiLU; ReLU that is not squared; gates without their sigmoid",
        parameters={"function": tuple(_FUNCTIONS), AT: _functions},
    ),
    Fault(
        name="operand-left-out",
        kinds=(*_OF_TWO, "l_out"),
        change=_one_operand,
        what="{at} is made without its {operand} operand",
        symptom="wrong from the first layer on that has this operation",
        fix="compare the operation with llama.cpp's graph: `parity model` lists it",
        seen="gates, bonuses and mixes that only one generation of a family has",
        parameters={"operand": ("second", "first"), AT: _pairs},
    ),
)
