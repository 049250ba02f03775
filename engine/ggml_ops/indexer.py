"""The scores by which sparse attention chooses its keys."""

import numpy as np

from ..backend import Array
from .params import OpParams, Shape, as_floats


def lightning_indexer(q: Array, k: Array, weights: Array, mask: Array, *, params: OpParams, shape: Shape) -> Array:
    """Σ over heads of weight · max(q · k, 0), plus the mask: [b, T, H, d], [b, S, 1, d], [b, 1, T, H], [b', 1, T, S] -> [b, 1, T, S].

    Mirrors ggml_compute_forward_lightning_indexer.
    """
    q, k, weights, mask = as_floats(q, k, weights, mask)
    scores = np.matmul(q, k[:, None, :, 0, :].swapaxes(-1, -2))  # [b, T, H, S]
    total = np.matmul(weights[:, 0, :, None, :], np.maximum(scores, 0))[:, :, 0]  # [b, T, S]
    return total[:, None] + np.tile(mask, (q.shape[0] // mask.shape[0], 1, 1, 1))
