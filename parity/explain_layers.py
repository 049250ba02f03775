"""Screens faults of single layers together: each changes one layer's output, and the layers after it are computed once.

A step that works row by row does not care whose rows it gets. So the outputs of many candidates are laid one after the
other, as if they were one long sequence, and only the attention keeps them apart.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine import ops
from engine.backend import Array
from engine.graph import PASSES, POSITIONS, History, Step, WeightSource, compute

_ROWS = 256  # rows computed at once: enough to keep the matrix products busy, few enough for [H, rows, rows] scores


def _apart(scores: Array, positions: Array, key_positions: Array, *, scale: float, rows: int) -> Array:
    """causal_soft_max of sequences of `rows` positions each, laid one after the other: [H, M · rows, M · rows]."""
    many = scores.shape[1] // rows
    group = np.arange(many).repeat(rows)
    hidden = np.where(group[None, :] == group[:, None], key_positions[None, :], positions.max() + 1)
    shifted = np.where(hidden > positions[:, None], np.float32(-np.inf), scores * np.float32(scale))
    shifted -= shifted.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=-1, keepdims=True, dtype=np.float64)
    weights *= (1.0 / total).astype(np.float32)
    return weights


def batch_size(rows: int) -> int:
    """How many candidates of so many rows are computed at once."""
    return max(1, _ROWS // rows)


def can_carry(steps: Sequence[Step]) -> bool:
    """Whether these steps work row by row, but for a plain causal attention."""
    return all(
        step.op in _ROW_BY_ROW and PASSES not in [read.of if isinstance(read, History) else read for read in step.reads]
        for step in steps
    )


_ROW_BY_ROW = (
    ops.rms_norm,
    ops.linear,
    ops.rope,
    ops.cached,
    ops.attention_scores,
    ops.causal_soft_max,
    ops.weighted_values,
    ops.add,
    ops.swiglu,
)


def carry(steps: Sequence[Step], start: str, outputs: Sequence[Array], positions: Array, weights: WeightSource) -> list[Array]:
    """Compute the steps after value `start` for many versions of it: each [R, D] -> each candidate's last value [R, n].

    Raises:
        KeyError: a step reads something else than `start`, the positions, and what the steps before it make.
    """
    rows, many = len(positions), len(outputs)
    values: dict[str, Any] = {start: np.concatenate(outputs), POSITIONS: np.tile(positions, many)}
    made = values[start]
    for step in steps:
        if step.op is ops.causal_soft_max:
            step = replace(step, op=_apart, params={**step.params, "rows": rows})  # noqa: PLW2901
        made = compute(step, [values[read.of if isinstance(read, History) else read] for read in step.reads], weights)
        values[step.makes] = made
    return [made[number * rows : (number + 1) * rows] for number in range(many)]
