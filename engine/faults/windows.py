"""Faults of features that only some models' attention has: windows, soft caps, a scale of the queries."""

from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, Values, parameter_of, read_of, sibling, subsets, with_parameters
from .edits import ggml, integer, maker, number, only, require, with_values

_SOFT = ("kq_soft_max",)
_SMALL = 17  # windows up to 16 are tried
_TANH = 4  # GGML_UNARY_OP_TANH
CAPPED = ("kq_scaled_2", "logits")
QUERY_SCALES = ("scale", "Qcur")


def has_window(step: Step) -> bool:
    """Whether a step is a soft max whose keys are limited to a window."""
    return step.op is ops.causal_soft_max and step.params.get("window", "causal") not in ("causal", "all")


def _off_by_one(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if not has_window(step):
        return step
    return with_parameters(step, size=step.params["size"] + (1 if parameters["holds"] == "one more" else -1))


def _sizes(right: Steps) -> Values:
    """Sizes that a window may be taken for: small ones, which short prompts show, and a power of two times its own."""
    own = {step.params["size"] for step in right.values() if has_window(step)}
    near = {size + by for size in own for by in (-1, 0, 1)}
    others = {*range(1, _SMALL), *(size * 2**power // 4 for size in own for power in range(5))} if own else set()
    return tuple(sorted(size for size in others - near if size > 0)) or (1,)


def _of_size(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return with_parameters(step, size=parameters["size"]) if has_window(step) else step


_USUAL_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _sizes_of_others(right: Steps) -> Values:
    """Sizes of a window where there is none: the model's own in other layers, small ones, which short prompts show, and usual ones."""
    own = {int(step.params["size"]) for step in right.values() if has_window(step)}
    return tuple(sorted({*own, *range(1, _SMALL), *_USUAL_SIZES}))


def _added(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.op is not ops.causal_soft_max or step.params.get("window", "causal") != "causal":
        return step
    return with_parameters(step, window="standard", size=parameters["size"])


def _ignored(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return with_parameters(step, window="causal", size=0) if has_window(step) else step


def _other_layers(step: Step, right: Steps, _parameters: Parameters) -> Step:
    others = [other for other in right.values() if other.op is ops.causal_soft_max]
    windows = {(other.params.get("window", "causal"), other.params.get("size", 0)) for other in others}
    if step.op is not ops.causal_soft_max or len(windows) != 2:
        raise NotApplicable(f"{step.makes}: there are no two kinds of layers")
    own = (step.params.get("window", "causal"), step.params.get("size", 0))
    window, size = next(iter(windows - {own}))
    return with_parameters(step, window=window, size=size)


def _chunks(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return with_parameters(step, window=parameters["window"]) if has_window(step) else step


def cap_of(step: Step, right: Steps) -> tuple[Step, float]:
    """The input step and the cap c of a soft cap, c · tanh(x / c), that ends in this step.

    Raises:
        NotApplicable: the step is not the end of a soft cap.
    """
    if not ggml(step, "SCALE"):
        raise NotApplicable(f"{step.makes} ends no soft cap")
    tanh = maker(step, right)
    if not ggml(tanh, "UNARY") or integer(tanh, 0) != _TANH:
        raise NotApplicable(f"{step.makes} ends no soft cap")
    return require(maker(tanh, right), "SCALE"), number(step, 0)


def _uncapped(step: Step, right: Steps, _parameters: Parameters) -> Step:
    return only(step, read_of(cap_of(step, right)[0], 0))


def recapped(step: Step, right: Steps, cap: float) -> Step:
    """The step with another cap: of scores [H, T, S] or logits [T, V]."""
    return replace(step, op=soft_capped, reads=(read_of(cap_of(step, right)[0], 0),), params={"cap": cap})


def soft_capped(x: Array, *, cap: float) -> Array:
    """c · tanh(x / c)."""
    number = x.dtype.type(cap)
    capped: Array = number * module_of(x).tanh(x / number)
    return capped


def _query_scale(step: Step, right: Steps, parameters: Parameters) -> Step:
    require(step, "SCALE")
    if read_of(step, 0) != sibling(step, right, "q_rope").makes:
        raise NotApplicable(f"{step.makes} does not scale the queries")
    if isinstance(parameters["scale"], float):
        return with_values(step, {0: parameters["scale"]})
    heads = parameter_of(sibling(step, right, "kq"), "heads")
    scale = number(step, 0)
    scales = {
        "missing": 1.0,
        "applied twice": scale**2,
        "by the width": scale * heads**-0.5,
        "by half the head size": scale * 2**0.5,
    }
    return with_values(step, {0: float(scales[parameters["scale"]])})


def _keys_if_as_wide(values: Array, keys: Array) -> Array:
    if values.shape != keys.shape:
        raise NotApplicable("keys and values are of different widths")
    return ops.cached(keys)


def _rotated_keys(step: Step, right: Steps, _parameters: Parameters) -> Step:
    keys = sibling(step, right, "k_read")
    if step.op is not ops.cached or keys.op is not ops.cached:
        raise NotApplicable(f"{step.makes} is not a plain read of the cache")
    return replace(step, op=_keys_if_as_wide, reads=(*step.reads, *keys.reads))


FAULTS = (
    Fault(
        name="window-off-by-one",
        kinds=_SOFT,
        change=_off_by_one,
        what="the attention's window holds {holds} position than it should",
        symptom="right while the text is shorter than the window, then wrong in layers with a window",
        fix="a window of n holds the position itself and the n − 1 before it",
        seen="< for ≤ in the mask",
        parameters={"holds": ("one more", "one fewer")},
    ),
    Fault(
        name="window-ignored",
        kinds=_SOFT,
        change=_ignored,
        what="layers with a window of attention see all earlier positions",
        symptom="right while the text is shorter than the window",
        fix="read <architecture>.attention.sliding_window, and which layers have it",
        seen="Llama code that loads Gemma 2, Gemma 3, Cohere 2 or gpt-oss",
    ),
    Fault(
        name="window-on-other-layers",
        kinds=_SOFT,
        change=_other_layers,
        what="the layers with and without an attention window are exchanged",
        symptom="right while the text is shorter than the window",
        fix="the pattern begins with layer 0: compare `parity model`",
        seen="patterns counted from 1",
    ),
    Fault(
        name="window-kind",
        kinds=_SOFT,
        change=_chunks,
        what="the window is of the kind {window!r}, which this model does not use",
        symptom="right while the text is shorter than the window",
        fix="Llama 4 attends within chunks, others to the last n positions",
        seen="one mask for all models",
        parameters={"window": ("chunked", "standard", "symmetric")},
    ),
    Fault(
        name="window-size",
        kinds=_SOFT,
        change=_of_size,
        what="the attention's window holds {size} positions",
        symptom="right while the text is shorter than the smaller window, then wrong in layers with a window",
        fix="read <architecture>.attention.sliding_window",
        seen="windows of another model of the family as constants",
        parameters={"size": _sizes},
    ),
    Fault(
        name="window-added",
        kinds=_SOFT,
        change=_added,
        what="attention has a window of {size}, where this model sees all earlier positions",
        symptom="right while the text is shorter than the window, then wrong",
        fix="no window without <architecture>.attention.sliding_window, and none in layers that have none",
        seen="Mistral code for models without a window; one window for all layers of Gemma 2 and 3",
        parameters={"size": _sizes_of_others},
    ),
    Fault(
        name="softcap-missing",
        kinds=CAPPED,
        change=_uncapped,
        what="the soft cap is missing, in {at}",
        symptom="large scores are too large, small ones are right",
        fix="c · tanh(x / c) with attn_logit_softcapping and final_logit_softcapping",
        seen="fused attention that has no cap",
        parameters={AT: subsets(*CAPPED)},
    ),
    Fault(
        name="query-scale",
        kinds=QUERY_SCALES,
        change=_query_scale,
        what="the scale of the queries is {scale}",
        symptom="position 0 is right, later ones are wrong",
        fix="scale the queries once, by the number that `parity model` shows",
        seen="query_pre_attn_scalar used as the head size; scales applied to queries and scores",
        parameters={"scale": ("missing", "applied twice", "by the width", "by half the head size")},
    ),
    Fault(
        name="keys-for-values",
        kinds=("v_read",),
        change=_rotated_keys,
        what="attention mixes keys, not values",
        symptom="wrong from position 0 on",
        fix="the second product reads the cache of values",
        seen="one pointer for both caches",
    ),
)
