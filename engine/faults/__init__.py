"""Known faults of engines, each a small change to the list of steps.

`plant` gives the list that an engine with that fault would run. A new fault is an entry in the `FAULTS` of its group's
file and a test.
"""

from collections.abc import Mapping

from msgspec.structs import replace

from . import (
    alibi,
    attention,
    biases,
    block_scales,
    caches,
    capture,
    delta_rule,
    dequantisation,
    encoder_decoder,
    expert_counts,
    expert_layouts,
    experts,
    feed_forward,
    fitted,
    fitted_numbers,
    flow,
    fused,
    head_counts,
    head_norms,
    key_counts,
    latent,
    layer_pattern,
    layer_weights,
    logits,
    masks,
    more_norms,
    multipliers,
    norm_places,
    norms,
    operations,
    parts,
    recurrences,
    recurrent,
    recurrent_state,
    residuals,
    rope,
    rope_extended,
    rope_layers,
    rope_part,
    router,
    row_norms,
    row_parts,
    rwkv,
    scan_results,
    sinks,
    tokens,
    weight_numbers,
    weights,
    windows,
)  # fmt: skip
from .base import AT, SEEN, Fault, Steps
from .fitted import Fitted
from .planting import Planting, as_recorded, plant

__all__ = ["AT", "CATALOGUE", "FITTED", "FITTED_PARTS", "SEEN", "Fault", "Fitted", "Planting", "Steps", "as_recorded", "plant"]

_GROUPS = {  # the first of several faults with the same numbers is named: a formula before weights that happen to look like it
    "tokens": tokens.FAULTS,
    "RoPE": (*rope.FAULTS, *rope_part.FAULTS, *rope_extended.FAULTS, *rope_layers.FAULTS),
    "norms": (*norms.FAULTS, *more_norms.FAULTS, *head_norms.FAULTS, *row_norms.FAULTS),
    "attention": (
        *attention.FAULTS,
        *masks.FAULTS,
        *key_counts.FAULTS,
        *head_counts.FAULTS,
        *windows.FAULTS,
        *alibi.FAULTS,
        *sinks.FAULTS,
        *layer_pattern.FAULTS,
        *caches.FAULTS,
        *latent.FAULTS,
        *encoder_decoder.FAULTS,
    ),
    "feed-forward": feed_forward.FAULTS,
    "experts": (*experts.FAULTS, *router.FAULTS, *expert_counts.FAULTS, *expert_layouts.FAULTS),
    "recurrent layers": (
        *recurrent.FAULTS,
        *delta_rule.FAULTS,
        *recurrences.FAULTS,
        *scan_results.FAULTS,
        *row_parts.FAULTS,
        *recurrent_state.FAULTS,
        *rwkv.FAULTS,
    ),
    "residual and flow": (*residuals.FAULTS, *flow.FAULTS, *norm_places.FAULTS),
    "numbers of a model": multipliers.FAULTS,
    "logits": logits.FAULTS,
    "weights": (*weights.FAULTS, *layer_weights.FAULTS, *fused.FAULTS),
    "operations": operations.FAULTS,
    "biases": biases.FAULTS,
    "dequantisation": (*dequantisation.FAULTS, *block_scales.FAULTS),
    "capture": capture.FAULTS,
}
# Numbers of one head or expert, or of one part of an operation: there are many, so that they are fitted only where no other number
# explains everything.
FITTED_PARTS = (*weight_numbers.FITTED, *parts.FITTED)
FITTED = (*fitted_numbers.FITTED, *fitted.FITTED)  # a number of the metadata before a factor that is not in the file
CATALOGUE: Mapping[str, Fault] = {
    fault.name: replace(fault, group=group) for group, faults in _GROUPS.items() for fault in faults
}
