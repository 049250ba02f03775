"""Which keys have another weight than they should is said in a sentence, of all heads or of some."""

from collections.abc import Callable

import numpy as np
import pytest

from engine.backend import Array
from parity.laws.beside import Beside
from parity.laws.keys import law_of_keys


def _first_key_alone(weights: Array) -> Array:
    changed = np.zeros_like(weights)
    changed[..., 0] = 1
    return changed


def _own_key_alone(weights: Array) -> Array:
    return np.eye(weights.shape[-1])[None] * np.ones_like(weights)


def _largest_key_alone(weights: Array) -> Array:
    return (np.arange(weights.shape[-1]) == weights.argmax(axis=-1)[..., None]).astype(np.float64)


def _second_head(weights: Array) -> Array:
    return np.concatenate([weights[:1], _first_key_alone(weights[1:2]), weights[2:]])


def _without_the_first(weights: Array) -> Array:
    changed = weights.copy()
    changed[..., 0] = 0
    return changed / np.maximum(changed.sum(axis=-1, keepdims=True), 1e-300)


def _without_the_own(weights: Array) -> Array:
    return weights * (1 - np.eye(weights.shape[-1]))


def _even(weights: Array) -> Array:
    return np.tri(weights.shape[-1])[None] / np.arange(1, weights.shape[-1] + 1)[:, None] * np.ones_like(weights)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_first_key_alone, "in every head the first key has the whole weight"),
        (_own_key_alone, "in every head the position's own key has the whole weight"),
        (_largest_key_alone, "in every head the key of the largest weight has the whole weight"),
        (_second_head, "in head 1 alone the first key has the whole weight"),
        (_without_the_first, "in every head the first key has no weight, and the others share it"),
        (_without_the_own, "in every head the position's own key has no weight; the earlier ones have the right ones"),
        (_even, "in every head all keys have the same weight"),
        (lambda weights: weights * 1.002, ""),
        (lambda weights: weights[::-1], ""),
    ],
)
def test_what_became_of_attentions_weights_is_said(change: Callable[[Array], Array], said: str) -> None:
    """Four heads of eight positions, each with a weight for every key up to its own; without the last values only whole heads count."""
    scores = np.where(np.tri(8, dtype=np.bool_), np.random.default_rng(1).normal(size=(4, 8, 8)), -np.inf)
    right = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    whole, dumped = (
        np.stack([np.pad(rows[:, t, : t + 1].ravel(), (0, 4 * (7 - t))) for t in range(8)]) for rows in (right, change(right))
    )
    rows = np.flatnonzero((dumped != whole).any(axis=1))
    sizes = 4 * np.arange(1, 9)
    for width in (32, 16):
        cut = width // 8
        compared = Beside(
            dumped[rows, :width], whole[rows, :width], np.arange(width), np.full(len(rows), 1e-8), np.zeros(len(rows)), rows
        )
        seen = said.replace("every head", "every head" if cut == 4 else f"every recorded head ({cut} of 4)")
        assert law_of_keys(compared, sizes[rows], np.minimum(sizes[rows], width), sizes) == seen
