"""Faults with a wrong number that is fitted to the records instead of being looked up in a list."""

from collections.abc import Callable, Mapping
from math import log10
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Step
from .attention import FAULTS as ATTENTION
from .base import AT, Change, Fault, Parameters, Steps, kind_of, kinds_of
from .edits import HandsOn, ggml, number
from .head_norms import unlisted
from .logits import FAULTS as LOGITS
from .norms import FAULTS as NORMS
from .norms import epsilon_of, kinds_with_epsilon, with_epsilon
from .number_words import as_root, near_scale, number_in_words, type_of_constant
from .rope import FAULTS as ROPE
from .rotation import both_then_each, is_rotation, rotary

_SCALED = (
    "attn_norm",
    "ffn_norm",
    "q",
    "k",
    "v",
    "kqv_out",
    "attn_out",
    "ffn_gate",
    "ffn_up",
    "ffn_swiglu",
    "ffn_moe_down",
    "ffn_moe_out",
    "ffn_shexp",
    "ffn_out",
    "ffn_inp",
    "l_out",
)
_LOG_OF_OTHER = 0.02  # of an ε that no other model has: the decimal logarithm of its ratio to the nearest that one has
_USUAL_NORMS = ("attn_norm", "ffn_norm", "output_norm")
_ONCE = ("embd", "output_norm", "logits")
_WITH_BIAS = ("q", "k", "v")


class Fitted(Struct, frozen=True, kw_only=True):
    """A fault with one parameter that is a number to be fitted.

    Attributes:
        parameter: its name; `fault.parameters` has the others and the values to try for them.
        wanted: the right value for this model, given the steps by name and the other parameters; None if the model has no such number.
        starts: the values from which the fit begins, given the right one (0 if there is none).
        positive: whether the number is positive, and fitted on a logarithmic scale.
        whole: whether only the starts themselves are tried.
        of_row: the name of a parameter that is the position of the first wrong row; "" if there is none. Row 0 then has no such fault.
        known: values that occur in other models, and in which.
    """

    fault: Fault
    parameter: str
    wanted: Callable[[Steps, Parameters], float | None]
    starts: Callable[[float], tuple[float, ...]]
    positive: bool = True
    whole: bool = False
    of_row: str = ""
    known: Mapping[float, str] | None = None

    def variants(self, right: Steps) -> list[dict[str, Any]]:
        """Every combination of the other parameters."""
        others = {name: values for name, values in self.fault.parameters.items() if name != self.parameter}
        return replace(self.fault, parameters=others).variants(right)

    def remarks(self, value: float, right: Steps, parameters: Parameters) -> str:
        """Remarks on a fitted value: the right value, and the nearest one of other models."""
        wanted = self.wanted(right, parameters)
        notes = [f"{value:.4g}{as_root(value)}"] if self.parameter == "scale" and as_root(value) else []
        notes += [] if wanted is None else [f"this model wants {number_in_words(wanted, self.parameter)}"]
        constant, other = (wanted, value) if wanted else self._multiplied(value, right, parameters)
        if kept := type_of_constant(other, constant):
            notes.append(f"it is {constant:g} rounded to {kept}: a constant that is kept in that type")
        if self.parameter == "scale" and wanted:
            notes += near_scale(value, wanted, right)
        if self.known and value > 0:
            near = min(self.known, key=lambda usual: abs(log10(usual) - log10(value)))
            if wanted is None or near != np.float32(wanted):
                notes.append(f"the nearest that others have is {near:g} ({self.known[near]})")
            if self.parameter == "eps" and wanted and abs(log10(near / value)) > _LOG_OF_OTHER:
                notes.append(f"values {(wanted / value) ** 0.5:.4g} times as large in front of the norm do the same")
        return ", ".join(notes)

    def _multiplied(self, value: float, right: Steps, parameters: Parameters) -> tuple[float, float]:
        """The constant by which this model multiplies where a factor is wrong, and what it is with that factor; 0 if there is none."""
        if self.parameter != "by":
            return 0.0, 0.0
        scales = (step for step in right.values() if kind_of(step) in parameters.get(AT, ()) and ggml(step, "SCALE"))
        constant = next((number(step, 0) for step in scales), 0.0)
        return constant, constant * value


def parameter_wanted(name: str, *kinds: str) -> Callable[[Steps, Parameters], float | None]:
    """The value of a parameter of the first step of these kinds."""

    def wanted(right: Steps, _parameters: Parameters) -> float | None:
        for step in right.values():
            if step.makes.rpartition(".")[2] in kinds and name in step.params:
                return float(step.params[name])
            if step.makes.rpartition(".")[2] in kinds and is_rotation(step):  # a rotation of ggml's
                return float(rotary(step, name))
        return None

    return wanted


class _Changed(HandsOn, frozen=True):
    """An operation whose result, or only its product before the bias is added, is multiplied or shifted by a number."""

    by: float
    how: str
    product: bool

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        bias = inputs[2] if self.product and len(inputs) > 2 else None
        value = self.op(*inputs[:2], **params) if bias is not None else self.op(*inputs, **params)
        number = value.dtype.type(self.by)
        changed = value * number if self.how == "times" else value + number
        return changed if bias is None else changed + bias


def _multiplied(how: str) -> Callable[[Step, Steps, Parameters], Step]:
    def change(step: Step, _right: Steps, parameters: Parameters) -> Step:
        product = parameters["part"] == "the product without its bias"
        if product and (step.op is not ops.linear or len(step.weights) < 2 or step.weights[1] is None):
            return step
        return replace(step, op=_Changed(step.op, parameters["by"], how, product))

    return change


def without_a_right_value(
    name: str,
    kinds: tuple[str, ...],
    change: Change,
    what: str,
    parameters: dict[str, Any],
    *texts: str,
    starts: tuple[float, ...],
    positive: bool = False,
) -> Fitted:
    """A fitted number that a right engine does not have. `parameters` begins with it; `texts`: the symptom, the fix, where it was seen."""
    symptom, fix, seen = texts
    fault = Fault(
        name=name,
        kinds=kinds,
        change=change,
        what=what,
        symptom=symptom,
        fix=fix,
        seen=seen,
        parameters=parameters,
        group="fitted",
    )
    return Fitted(
        fault=fault, parameter=next(iter(parameters)), wanted=lambda *_: None, starts=lambda _wanted: starts, positive=positive
    )


_EVERY: dict[str, Any] = {"part": ("the result",), AT: tuple((kind,) for kind in (*_SCALED, *_ONCE))}
_PRODUCTS: dict[str, Any] = {"part": ("the product without its bias",), AT: tuple((kind,) for kind in _WITH_BIAS)}


def _new(name: str, summary: str, fix: str, where: dict[str, Any], how: str) -> Fault:
    return Fault(
        name=name,
        kinds=(*_SCALED, *_ONCE),
        change=_multiplied(how),
        what=summary,
        symptom="values of plausible size, wrong by the same number everywhere",
        fix=fix,
        seen="multipliers of other architectures (Granite, Gemma, MiniCPM); scales folded into weights; constants added twice",
        parameters={"by": (), **where},
        group="fitted",
    )


def number_at(kind: str, shifted: bool, start: float) -> Fitted:
    """A factor (or, if `shifted`, a summand) of the results of one kind of step, fitted from a start: for kinds that no entry lists."""
    name, summary, fix, how = (
        ("constant-added", _PLUS, _PLUS_FIX, "plus") if shifted else ("multiplier", _TIMES, _SCALE_FIX, "times")
    )
    fault = replace(_new(name, summary, fix, {"part": ("the result",), AT: ((kind,),)}, how), kinds=(kind,))
    return Fitted(fault=fault, parameter="by", wanted=lambda *_: None, starts=lambda _wanted: (start,), positive=False)


def _epsilon(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return with_epsilon(step, parameters["eps"])


def _other_norms(right: Steps) -> tuple[tuple[str, ...], ...]:
    """The kinds of norms that not every model has (of heads, of latents, after a branch): all together, those of queries and keys,
    each alone."""
    each = tuple(kind for kind in kinds_with_epsilon(right) if kind not in _USUAL_NORMS)
    own = unlisted(right)
    heads = tuple(kind for kind in each if kind in ("q_norm", "k_norm", *own))
    return tuple(dict.fromkeys(chosen for chosen in (each, heads, *((kind,) for kind in each)) if chosen))


def _epsilon_wanted(right: Steps, parameters: Parameters) -> float | None:
    """The ε of the first norm to which these parameters refer."""
    kinds = parameters[AT]
    known = (epsilon_of(step) for step in right.values() if not set(kinds).isdisjoint(kinds_of(step)))
    return next((eps for eps in known if eps is not None), None)


def _epsilons(wanted: float) -> tuple[float, ...]:
    """Values from which the fit of an ε begins."""
    return around(3.0, 100.0, 3e3, 1e5)(wanted) if wanted > 0 else (1e-6, 1e-4, 1e-2)


_OTHER_EPSILON = Fault(
    name="head-norm-epsilon",
    kinds=("RMS_NORM", "NORM", "L2_NORM"),
    change=_epsilon,
    what="ε is {eps}, which is not this model's, in {at}",
    symptom="a difference of 1e-8 to 1e-3 that looks like rounding",
    fix="read <architecture>.attention.layer_norm_rms_epsilon from the file, for the norms of heads and branches as well",
    seen="norm kernels with their own constant for queries and keys",
    parameters={"eps": (), AT: _other_norms},
    group="fitted",
)
_TIMES = "{part} of {at} is {by} times as large as in this model"
_PLUS = "{by} is added to every element of {at}"
_SCALE_FIX, _PLUS_FIX = "remove the factor, or read it from the file", "remove the constant"

_EPSILONS = {1e-5: "Llama 2, Mistral", 1e-6: "Qwen2, Gemma", 1e-8: "Adam's", 1e-12: "BERT"}
CAPS = {30.0: "Gemma 2's logits, Grok", 50.0: "Gemma 2's attention"}


def named(faults: tuple[Fault, ...], name: str) -> Fault:
    """The fault of that name."""
    return next(fault for fault in faults if fault.name == name)


def around(*factors: float) -> Callable[[float], tuple[float, ...]]:
    """Starts at these multiples of the right number."""
    return lambda wanted: tuple(wanted * factor for factor in factors)


_ROPE_BASE = replace(
    named(ROPE, "rope-base"),
    what="RoPE's base is {base}, which is not this model's, on {at}",
    parameters={"base": (), AT: both_then_each},
    group="fitted",
)

FITTED = (
    Fitted(
        fault=named(NORMS, "norm-epsilon"),
        parameter="eps",
        wanted=_epsilon_wanted,
        starts=_epsilons,
        known=_EPSILONS,
    ),
    Fitted(
        fault=_OTHER_EPSILON,
        parameter="eps",
        wanted=_epsilon_wanted,
        starts=_epsilons,
        known=_EPSILONS,
    ),
    Fitted(
        fault=named(ATTENTION, "attn-scale"),
        parameter="scale",
        wanted=parameter_wanted("scale", "kq_soft_max"),
        starts=around(1.001, 1.1, 2.0, 0.5, 8.0, 0.125),
    ),
    Fitted(
        fault=_ROPE_BASE,
        parameter="base",
        wanted=parameter_wanted("base", "q_rope", "q_pe"),
        starts=lambda wanted: (
            1.001 * wanted,
            1.05 * wanted,
            0.95 * wanted,
            *(10.0**n for n in (2, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 8)),
        ),
        known={1e4: "Llama 1 and 2", 5e5: "Llama 3", 1e6: "Qwen2, Mixtral"},
    ),
    Fitted(
        fault=named(ROPE, "rope-scaling"),
        parameter="scaling",
        wanted=parameter_wanted("scale", "q_rope", "q_pe"),
        starts=around(1.001, 1.02, 0.98, 0.5, 0.25, 0.125, 2.0, 4.0),
    ),
    Fitted(
        fault=replace(named(ROPE, "rope-position"), what="RoPE's positions on {at} are off by {position}"),
        parameter="position",
        wanted=lambda *_: None,
        starts=lambda _wanted: tuple(float(n) for n in (*range(-16, 0), *range(1, 17))),
        positive=False,
        whole=True,
    ),
    Fitted(
        fault=_new("multiplier", _TIMES, _SCALE_FIX, _EVERY, "times"),
        parameter="by",
        wanted=lambda *_: None,
        starts=lambda _wanted: (1.01, 2.0, -1.0),
        positive=False,
    ),
    Fitted(
        fault=_new("product-multiplier", _TIMES, _SCALE_FIX, _PRODUCTS, "times"),
        parameter="by",
        wanted=lambda *_: None,
        starts=lambda _wanted: (1.01, 2.0, -1.0),
        positive=False,
    ),
    Fitted(
        fault=_new("constant-added", _PLUS, _PLUS_FIX, _EVERY, "plus"),
        parameter="by",
        wanted=lambda *_: None,
        starts=lambda _wanted: (0.01,),
        positive=False,
    ),
    Fitted(
        fault=named(LOGITS, "logits-softcap"),
        parameter="cap",
        wanted=lambda *_: None,
        starts=lambda _wanted: (10.0, 30.0, 100.0),
        known=CAPS,
    ),
)
