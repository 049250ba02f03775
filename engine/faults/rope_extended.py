"""Faults of rotations beyond the plain one: YaRN, factors for long contexts, sections of several positions, a part of each head."""

from math import log
from typing import Any

from msgspec.structs import replace

from checkpoints.long_factors import LONG, SHORT

from .. import ops
from ..backend import Array, module_of
from ..graph import Altered, Step, WeightSource
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps
from .edits import integer, number, require, with_values
from .rotation import ROTATED, SECTIONS, at_positions, both, both_then_each

# ggml's op_params of ROPE: integers, then floats.
_MODE, _CONTEXT, _FIRST_SECTION = 2, 4, 11
_SCALE, _MIX, _MAGNITUDE, _FAST, _SLOW = 6, 7, 8, 9, 10
_SIDE_BY_SIDE, _INTERLEAVED = 8, 40  # GGML_ROPE_TYPE_MROPE, GGML_ROPE_TYPE_IMROPE


def _rounded_frequencies(
    x: Array, positions: Array, factors: Array | None = None, *, dims: int, base: float, to: str, **others: Any
) -> Array:
    """RoPE whose frequencies, before they are multiplied by the positions, are rounded to another type: as `ops.rope`."""
    xp = module_of(x)
    plain = xp.float64(base) ** (-2.0 * xp.arange(dims // 2) / dims)
    wanted = (plain if factors is None else plain / factors[: dims // 2].astype(xp.float64)).astype(xp.float32)
    if to == "F16":
        rounded = wanted.astype(xp.float16).astype(xp.float32)
    else:
        bits = wanted.view(xp.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(xp.uint32).view(xp.float32)
    return ops.rope(x, positions, (plain / rounded).astype(xp.float32), dims=dims, base=base, **others)


def _frequencies(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.op is not ops.rope:
        raise NotApplicable(f"{step.makes} is not a plain RoPE")
    return replace(step, op=_rounded_frequencies, params={**step.params, "to": parameters["to"]})


def _yarn(step: Step, _right: Steps, parameters: Parameters) -> Step:
    require(step, "ROPE")
    scale, mix, magnitude = number(step, _SCALE), number(step, _MIX), number(step, _MAGNITUDE)
    if mix == 0 or scale in (0.0, 1.0):
        raise NotApplicable(f"{step.makes} has no YaRN")
    grown = 1.0 + 0.1 * log(1.0 / scale)  # the further factor of cos and sin in ggml's rope_yarn
    context, fast, slow = integer(step, _CONTEXT), number(step, _FAST), number(step, _SLOW)
    changes: dict[str, dict[int, int | float]] = {
        "ignored": {_SCALE: 1.0, _MIX: 0.0, _MAGNITUDE: 1.0},
        "used without its ramp: every frequency is interpolated": {_MIX: 0.0, _MAGNITUDE: magnitude * grown},
        "used without its ramp and magnitude: linear interpolation": {_MIX: 0.0, _MAGNITUDE: 1.0},
        "used without its factor: the magnitude alone": {_SCALE: 1.0, _MIX: 0.0, _MAGNITUDE: magnitude * grown},
        "used without its magnitude": {_MAGNITUDE: 1.0 / grown},
        "used with its magnitude squared": {_MAGNITUDE: magnitude**2 * grown},
        "used with β fast and β slow exchanged": {_FAST: slow, _SLOW: fast},
        "used with a ramp by the extended context, not the original one": {_CONTEXT: round(context / scale)},
        "used with a ramp by twice the original context": {_CONTEXT: 2 * context},
        "used with a ramp by half the original context": {_CONTEXT: context // 2},
        "used with β fast twice too large": {_FAST: 2 * fast},
        "used with β slow twice too large": {_SLOW: 2 * slow},
    }
    return with_values(step, changes[parameters["yarn"]])


_YARN = (
    "ignored",
    "used without its ramp: every frequency is interpolated",
    "used without its ramp and magnitude: linear interpolation",
    "used without its factor: the magnitude alone",
    "used without its magnitude",
    "used with its magnitude squared",
    "used with β fast and β slow exchanged",
    "used with a ramp by the extended context, not the original one",
    "used with a ramp by twice the original context",
    "used with a ramp by half the original context",
    "used with β fast twice too large",
    "used with β slow twice too large",
)


def _magnitude(step: Step, _right: Steps, parameters: Parameters) -> Step:
    require(step, "ROPE")
    magnitude = number(step, _MAGNITUDE)
    if magnitude == 1 or number(step, _MIX) != 0:
        raise NotApplicable(f"{step.makes} multiplies by no separate magnitude")
    return with_values(step, {_MAGNITUDE: 1.0 if parameters["magnitude"] == "left out" else magnitude**2})


_OF_OTHER_LENGTH = {SHORT: LONG, LONG: SHORT}


def _in_place_of(weight: str) -> Altered:
    """The factors for long contexts in place of those for short ones, or the other way round."""

    def make(source: WeightSource, name: str) -> Array:
        try:
            return source.get(_OF_OTHER_LENGTH[name])
        except KeyError as error:  # llama.cpp accepts files with only one of the two
            raise NotApplicable(f"the file has no {_OF_OTHER_LENGTH[name]}") from error

    return Altered(weight, make)


def _other_factors(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    weights = tuple(_in_place_of(weight) if weight in (SHORT, LONG) else weight for weight in step.weights)
    if weights == step.weights:
        raise NotApplicable(f"{step.makes} has no factors for two lengths")
    return replace(step, weights=weights)


def _time_alone(positions: Array) -> Array:
    """Positions whose sections of height and width are 0: [4 · T]."""
    sections = module_of(positions).zeros_like(positions).reshape(SECTIONS, -1)
    sections[0] = positions.reshape(SECTIONS, -1)[0]
    moved: Array = sections.reshape(positions.shape)
    return moved


def _sections(step: Step, _right: Steps, parameters: Parameters) -> Step:
    mode = integer(require(step, "ROPE"), _MODE)
    if mode not in (_SIDE_BY_SIDE, _INTERLEAVED):
        raise NotApplicable(f"{step.makes} has no sections")
    if parameters["sections"] == "only time's section is rotated":
        return at_positions(step, _time_alone)
    if parameters["sections"] == "the sections of time and width are exchanged":
        first, last = integer(step, _FIRST_SECTION), integer(step, _FIRST_SECTION + 2)
        return with_values(step, {_FIRST_SECTION: last, _FIRST_SECTION + 2: first})
    return with_values(step, {_MODE: _INTERLEAVED if mode == _SIDE_BY_SIDE else _SIDE_BY_SIDE})


def _far_pairs(x: Array, positions: Array, factors: Array | None, *, heads: int, dims: int, **params: Any) -> Array:
    """Element i of each head rotated with i + d/2, not i + dims/2: [T, heads · d] -> [T, heads · d]."""
    xp, size = module_of(x), x.shape[1] // heads
    near, far = list(range(dims // 2)), list(range(size // 2, size // 2 + dims // 2))
    order = xp.asarray([*near, *far, *(at for at in range(size) if at not in near and at not in far)])
    split = x.reshape(len(x), heads, size)[:, :, order].reshape(x.shape)
    rotated = ops.rope(split, positions, factors, heads=heads, dims=dims, **params).reshape(len(x), heads, size)
    result: Array = rotated[:, :, xp.argsort(order)].reshape(x.shape)
    return result


def _pairs_of_head(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.rope or step.params["pairs"] != "neox":
        raise NotApplicable(f"{step.makes} does not pair halves")
    return replace(step, op=_far_pairs)


_LATER = "position 0 is right, later ones are wrong"

FAULTS = (
    Fault(
        name="yarn",
        kinds=ROTATED,
        change=_yarn,
        what="YaRN is {yarn}, on {at}",
        symptom="position 0 is right or wrong by one factor, later ones are wrong",
        fix="mix interpolated and plain angles by the ramp of β, and multiply cos and sin by 1 + 0.1 · ln(factor), once",
        seen="engines that know linear scaling only; magnitudes applied by attention as well",
        parameters={"yarn": _YARN, AT: both_then_each},
    ),
    Fault(
        name="rope-magnitude",
        kinds=ROTATED,
        change=_magnitude,
        what="the magnitude of the scaled rotation is {magnitude}, on {at}",
        symptom="wrong from position 1 on, scores too small or too large by one factor",
        fix="multiply cos and sin by rope.scaling.attn_factor, once: for queries and for keys",
        seen="longrope read as frequency factors only",
        parameters={"magnitude": ("left out", "squared"), AT: both},
    ),
    Fault(
        name="rope-factors-of-other-length",
        kinds=ROTATED,
        change=_other_factors,
        what="the frequency factors for long contexts are used for a short one, or vice versa, on {at}",
        symptom=_LATER,
        fix="rope_factors_short if the context is at most the original one, rope_factors_long beyond",
        seen="Phi-3 ports that use the model's context length instead of the run's",
        parameters={AT: both},
    ),
    Fault(
        name="rope-frequencies-rounded",
        kinds=ROTATED,
        change=_frequencies,
        what="RoPE's frequencies are rounded to {to} before they are multiplied by the position, on {at}",
        symptom="position 0 is right, an error of 1e-7 to 1e-4 grows with the position; at long contexts it is a wrong text",
        fix="compute frequencies and angles in float32; only cos and sin may be rounded",
        seen="inv_freq kept as a buffer of the model, which is cast with it: GPT-NeoX, transformers 4.31, sglang-jax",
        parameters={"to": ("BF16", "F16"), AT: both},
    ),
    Fault(
        name="rope-sections",
        kinds=ROTATED,
        change=_sections,
        what="the sections of the rotation are wrong: {sections}, on {at}",
        symptom=_LATER,
        fix="text has one position for time, height and width; the fourth section is 0; sections are contiguous, or interleaved",
        seen="Qwen2-VL code that loads Qwen3-VL or Qwen3.5; text treated as the first row of an image",
        parameters={
            "sections": (
                "only time's section is rotated",
                "in turn for side by side, or the other way round",
                "the sections of time and width are exchanged",
            ),
            AT: both,
        },
    ),
    Fault(
        name="rope-pairs-of-head",
        kinds=ROTATED,
        change=_pairs_of_head,
        what="of a head of which a part is rotated, element i is paired with i + half the head, not with i + half the part",
        symptom=_LATER,
        fix="rotate the first rope.dimension_count elements as if they were the head, and hand on the others",
        seen="partial rotary of Phi, StableLM and GLM in code for whole heads",
        parameters={AT: both},
    ),
)
