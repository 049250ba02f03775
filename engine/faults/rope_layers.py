"""Faults of models that rotate queries and keys in some layers only (Cohere 2, SmolLM3, Llama 4, EXAONE 4)."""

from collections.abc import Sequence

from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import POSITIONS, History, Read, Step
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, Values, kind_of, layer_of, read_of
from .rotation import ROTATED, is_rotation


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


def _rotates(step: Step) -> bool:
    return is_rotation(step) or kind_of(step) in ROTATED


def _pairs_of(right: Steps) -> Values:
    """The values of `pairs`; none for a model that rotates somewhere."""
    return () if any(_rotates(step) for step in right.values()) else ("neox", "norm")


def _added(step: Step, right: Steps, parameters: Parameters) -> Step | Sequence[Step]:
    """The scores of queries and keys that are rotated, in a model that rotates in no layer."""
    if step.op is not ops.attention_scores or not _pairs_of(right):
        raise NotApplicable("the model rotates queries and keys")
    heads, kv_heads = step.params["heads"], step.params["kv_heads"]
    sides: tuple[tuple[str, Read, int], ...] = (("queries", POSITIONS, heads), ("keys", History(POSITIONS), kv_heads))
    rotated = [
        Step(
            f"{step.makes}.{side}", _whole_heads, (read_of(step, at), positions),
            params={"heads": of, "base": 1e4, "pairs": parameters["pairs"]}, inner=True,
        )
        for at, (side, positions, of) in enumerate(sides)
    ]  # fmt: skip
    return *rotated, replace(step, reads=tuple(of.makes for of in rotated))


def _whole_heads(x: Array, positions: Array, *, heads: int, base: float, pairs: str) -> Array:
    """[T, heads · d], [T] -> [T, heads · d], every element rotated."""
    return ops.rope(x, positions, None, heads=heads, dims=x.shape[1] // heads, base=base, scale=1.0, pairs=pairs)


FAULTS = (
    Fault(
        name="rope-added",
        kinds=("kq",),
        change=_added,
        what="queries and keys are rotated ({pairs} pairs, base 10,000), which this model does in no layer",
        symptom="position 0 is right, later ones are wrong",
        fix="no RoPE for models with position embeddings or linear biases: BERT, GPT-2, MPT, BLOOM",
        seen="an attention block whose RoPE is on unless told otherwise",
        parameters={"pairs": _pairs_of},
    ),
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
