"""Numbers that only some models have, fitted: scales of queries, multipliers, soft caps."""

from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Step
from ..inapplicable import NotApplicable
from .alibi import FAULTS as ALIBI
from .alibi import USUAL
from .base import AT, Fault, Parameters, Steps, kind_of
from .edits import WithInput, ggml, number
from .fitted import CAPS, Fitted, around, named, parameter_wanted
from .multipliers import FAULTS as MULTIPLIERS
from .windows import CAPPED, QUERY_SCALES, cap_of, recapped, soft_capped
from .windows import FAULTS as WINDOWS


def _scale_of(*kinds: str) -> Callable[[Steps, Parameters], float | None]:
    """The factor of the first SCALE of these kinds that is not part of a soft cap."""

    def wanted(right: Steps, _parameters: Parameters) -> float | None:
        for step in right.values():
            if kind_of(step) in kinds and ggml(step, "SCALE"):
                try:
                    cap_of(step, right)
                except NotApplicable:
                    return number(step, 0)
        return None

    return wanted


def _cap(kind: str) -> Callable[[Steps, Parameters], float | None]:
    def wanted(right: Steps, _parameters: Parameters) -> float | None:
        for step in right.values():
            if kind_of(step) == kind:
                try:
                    return cap_of(step, right)[1]
                except NotApplicable:
                    return None
        return None

    return wanted


def _other_cap(step: Step, right: Steps, parameters: Parameters) -> Step:
    return recapped(step, right, parameters["cap"])


def _at(fault: Fault, parameter: str, *kinds: str) -> Fault:
    """The fault in these steps, with a number that is fitted."""
    parameters: dict[str, Any] = {parameter: (), AT: (kinds,)}
    return replace(fault, kinds=kinds, parameters=parameters)


_CAP = Fault(
    name="softcap-value",
    kinds=CAPPED,
    change=_other_cap,
    what="the soft cap is {cap}, in {at}",
    symptom="large scores are too small or too large, small ones are right",
    fix="attn_logit_softcapping for attention, final_logit_softcapping for the logits",
    seen="one cap for both; caps of another model as constants",
    parameters={"cap": (), AT: (("logits",),)},
    group="fitted",
)
_ACTIVATIONS = ("ffn_swiglu", "ffn_geglu", "ffn_gelu", "ffn_moe_swiglu", "ffn_moe_geglu", "GLU")


class _Clamp(Struct, frozen=True):
    """Values limited from above, or in both directions."""

    limit: float
    both: bool

    def __call__(self, x: Array) -> Array:
        """Any shape."""
        limit = x.dtype.type(self.limit)
        clamped: Array = module_of(x).clip(x, -limit if self.both else None, limit)
        return clamped


def _clamped(step: Step, _right: Steps, parameters: Parameters) -> Step:
    at = int(parameters["of"] == "the other factor")
    if at >= len(step.reads):
        raise NotApplicable(f"{step.makes} has one factor")
    return replace(
        step, op=WithInput(step.op, at, _Clamp(parameters["limit"], at == 1 or parameters["of"].endswith("both sides")))
    )


_CLAMPED = Fault(
    name="activation-clamped",
    kinds=_ACTIVATIONS,
    change=_clamped,
    what="{of}{limit}, which this model does not do",
    symptom="right where activations are small, large ones are cut off",
    fix="only gpt-oss and a few others clamp; read the limit from the file",
    seen="gpt-oss' clamped SwiGLU for other models; clamps against overflow in half precision",
    parameters={
        "limit": (),
        "of": ("the activation's argument on both sides", "the activation's argument from above", "the other factor"),
    },
    says={
        "the activation's argument on both sides": "the activation's argument is cut off on both sides, at ±",
        "the activation's argument from above": "the activation's argument is cut off above ",
        "the other factor": "the other factor is cut off on both sides, at ±",
    },
    group="fitted",
)
_ALIBI = replace(
    named(ALIBI, "alibi"),
    what="attention's linear biases (ALiBi) have max_bias {bias}",
    parameters={"bias": ()},
    group="fitted",
)


def _capped_soft_max(scores: Array, *inputs: Array, scale: float, cap: float, **params: Any) -> Array:
    return ops.causal_soft_max(soft_capped(scores * scores.dtype.type(scale), cap=cap), *inputs, scale=1.0, **params)


def _attention_cap(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.op is not ops.causal_soft_max:
        raise NotApplicable(f"{step.makes} is no plain soft max")
    return replace(step, op=_capped_soft_max, params={**step.params, "cap": parameters["cap"]})


_ATTENTION_CAP = Fault(
    name="attn-softcap",
    kinds=("kq_soft_max",),
    change=_attention_cap,
    what="attention's scores are capped, {cap} · tanh(x / {cap}), though the model has no cap",
    symptom="position 0 is right, large scores are too small",
    fix="only Gemma 2 caps its scores",
    seen="ports of Gemma code",
    parameters={"cap": ()},
    group="fitted",
)


_LINEAR = {USUAL: "MPT, BLOOM"}
_MULTIPLIER = named(MULTIPLIERS, "multiplier")
_MOST = 8  # kinds of steps that multiply by a number and have no row here
_MULTIPLIED = {  # the steps that multiply by a number of the metadata, with the values that other models have
    ("embd",): {1.0: "none", 12.0: "Granite, MiniCPM", 45.25: "Gemma's √2048", 55.43: "Gemma's √3072"},
    ("scale", "scale.2"): {1.0: "none", 0.22: "Granite"},
    ("hidden_scaled", "hidden_scaled_ffn"): {1.0: "none"},
    ("logits",): {1.0: "none", 0.0625: "Command R", 1 / 6: "Granite"},
    ("ffn_moe_weights_scaled",): {1.0: "none", 2.5: "DeepSeek-V3", 16.0: "DeepSeek-V2"},
}


def _other_scales(right: Steps) -> tuple[tuple[str, ...], ...]:
    """Values of `at`: the kinds of the model's other steps that multiply by a number, each alone."""
    listed = {kind for kinds in (*_MULTIPLIED, QUERY_SCALES) for kind in kinds}
    kinds = dict.fromkeys(kind_of(step) for step in right.values() if ggml(step, "SCALE") and not step.inner)
    return tuple((kind,) for kind in kinds if kind not in listed)[:_MOST]


FITTED = (
    Fitted(
        fault=_CLAMPED,
        parameter="limit",
        wanted=lambda *_: None,
        starts=lambda _wanted: (0.5, 1.0, 2.0, 4.0, 7.0, 10.0, 20.0),
        known={7.0: "gpt-oss", 10.0: "DeepSeek-V4"},
    ),
    Fitted(
        fault=_at(named(WINDOWS, "query-scale"), "scale", *QUERY_SCALES),
        parameter="scale",
        wanted=_scale_of(*QUERY_SCALES),
        starts=around(1.1, 2.0, 0.5, 8.0, 0.125),
    ),
    Fitted(
        fault=named(ALIBI, "alibi-added"),
        parameter="bias",
        wanted=lambda *_: None,
        starts=lambda _wanted: (1.0, 2.0, 4.0, 10.0, 16.0, 32.0),
        whole=True,  # biases of a large one are so small that they would fit noise
        known=_LINEAR,
    ),
    Fitted(
        fault=_ATTENTION_CAP,
        parameter="cap",
        wanted=lambda *_: None,
        starts=lambda _wanted: (10.0, 30.0, 100.0),
        known=CAPS,
    ),
    Fitted(
        fault=_ALIBI,
        parameter="bias",
        wanted=parameter_wanted("max_bias", "kq_soft_max"),
        starts=around(1.05, 2.0, 0.5),
        known=_LINEAR,
    ),
    *(
        Fitted(
            fault=_at(_MULTIPLIER, "how", *kinds),
            parameter="how",
            wanted=_scale_of(*kinds),
            starts=around(1.05, 2.0, 0.5),
            known=known,
        )
        for kinds, known in _MULTIPLIED.items()
    ),
    Fitted(
        fault=replace(_MULTIPLIER, kinds=("SCALE",), parameters={"how": (), AT: _other_scales}),
        parameter="how",
        wanted=lambda right, parameters: _scale_of(*parameters[AT])(right, parameters),
        starts=around(1.05, 2.0, 0.5),
    ),
    *(
        Fitted(
            fault=_at(_CAP, "cap", kind),
            parameter="cap",
            wanted=_cap(kind),
            starts=around(1.1, 2.0, 0.5),
            known=CAPS,
        )
        for kind in CAPPED
    ),
)
