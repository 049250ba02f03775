"""Faults of models that rotate queries and keys in some layers only (Cohere 2, SmolLM3, Llama 4, EXAONE 4)."""

from collections.abc import Sequence

from msgspec.structs import replace

from .. import ops
from ..graph import POSITIONS, History, Step
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, layer_of, read_of


def _rotated(step: Step, right: Steps, _parameters: Parameters) -> Step | Sequence[Step]:
    """The scores of queries and keys that are rotated as in the model's other layers."""
    layer = layer_of(step)
    queries, keys = (next((right[name] for name in right if name.endswith(kind)), None) for kind in (".q_rope", ".k_rope"))
    if step.op is not ops.attention_scores or queries is None or keys is None:
        raise NotApplicable("the model rotates in no layer, or not queries and keys by themselves")
    if f"blk.{layer}.q_rope" in right:
        return step
    if queries.op is not ops.rope or keys.op is not ops.rope:
        raise NotApplicable(f"{queries.makes} is not a plain RoPE")
    read = read_of(step, 1)
    of_queries = replace(queries, makes=f"{step.makes}.queries", reads=(read_of(step, 0), POSITIONS), inner=True)
    of_keys = replace(keys, makes=f"{step.makes}.keys", reads=(read, History(POSITIONS)), inner=True)
    return of_queries, of_keys, replace(step, reads=(of_queries.makes, of_keys.makes))


FAULTS = (
    Fault(
        name="rope-in-layers-without",
        kinds=("kq",),
        change=_rotated,
        what="queries and keys are also rotated in the layers in which this model does not rotate",
        symptom="right up to the first layer without RoPE; there position 0 is right, later ones are wrong",
        fix="rotate only where the model does: no_rope_layer_interval, or the layers with a window",
        seen="Cohere 2, SmolLM3, Llama 4 and EXAONE 4 loaded by code for models that rotate everywhere",
    ),
)
