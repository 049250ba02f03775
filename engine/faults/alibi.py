"""Faults of attention's linear biases (ALiBi): scores that fall with the key's distance, by a slope of each head."""

from typing import Any

from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..ggml_ops.soft_max import alibi_slopes
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, with_parameters

_SOFT = ("kq_soft_max",)
USUAL = 8.0  # max_bias of MPT and BLOOM


def _alibi(step: Step, _right: Steps, parameters: Parameters) -> Step:
    own = step.params.get("max_bias", 0.0)
    if step.op is not ops.causal_soft_max or own == 0:
        raise NotApplicable(f"{step.makes} has no linear biases")
    how = parameters["bias"]
    if how == "left out":
        return with_parameters(step, max_bias=0.0)
    if not isinstance(how, str):  # another max_bias, which is fitted
        return with_parameters(step, max_bias=float(how))
    return replace(step, op=_with_slopes, params={**step.params, "slopes": how})


def _slopes(heads: int, max_bias: float, how: str) -> list[float]:
    """The slopes of an engine that gets them wrong: [H]."""
    if how == "those of half of the heads, twice":
        return alibi_slopes(max(1, heads // 2), max_bias) * 2 if heads % 2 == 0 else alibi_slopes(heads, max_bias)
    first = 0 if how == "one step too steep" else 1
    return [2.0 ** (-max_bias * (head + first) / heads) for head in range(heads)]


def _with_slopes(
    scores: Array, positions: Array, keys: Array, *sinks: Array, slopes: str, scale: float, max_bias: float, **params: Any
) -> Array:
    xp, chosen = module_of(scores), _slopes(scores.shape[0], max_bias, slopes)
    lowered = xp.asarray(chosen, dtype=scores.dtype)[:, None, None] * abs(positions[:, None] - keys[None, :]).astype(
        scores.dtype
    )
    return ops.causal_soft_max(scores - lowered / scores.dtype.type(scale), positions, keys, *sinks, scale=scale, **params)


def _added(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.op is not ops.causal_soft_max or step.params.get("max_bias", 0.0) != 0:
        raise NotApplicable(f"{step.makes} has linear biases anyway")
    return with_parameters(step, max_bias=parameters["bias"])


FAULTS = (
    Fault(
        name="alibi",
        kinds=_SOFT,
        change=_alibi,
        what="attention's linear biases (ALiBi) are {bias}",
        symptom="position 0 is right, later ones are wrong",
        fix="slopes 2^(−max_bias · i / heads) by <architecture>.attention.max_alibi_bias",
        seen="Llama code that loads MPT, BLOOM or Baichuan 13B; slopes for powers of two only (ml-explore/mlx#3071)",
        parameters={
            "bias": ("left out", "one step too steep", "one series for all heads", "those of half of the heads, twice")
        },
    ),
    Fault(
        name="alibi-added",
        kinds=_SOFT,
        change=_added,
        what="attention's scores have linear biases (ALiBi) of max_bias {bias}, though the model has none",
        symptom="position 0 is right, later ones are wrong",
        fix="no linear biases without <architecture>.attention.max_alibi_bias",
        seen="ALiBi added to a model with learned positions (vllm-project/vllm#37631)",
        parameters={"bias": (USUAL,)},
    ),
)
