"""Weights that are kept: all where they fit into memory, else as many as fit, and the values are the same."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine import backend
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from engine.weights.source import Weights

TOKENS = [1, 2, 3, 4]


@pytest.mark.parametrize(("share", "kept"), [(10.0, "all"), (0.6, "some"), (0.01, "none")])
def test_no_more_is_kept_than_fits(synthetic: Callable[..., Path], share: float, kept: str) -> None:
    """With memory for ten times the model, for a part of it or for none, that much is held, and the logits are equal to the bit."""
    path = synthetic("tiny", "q8_0", layers=6)
    model = GgufModel(path)
    whole = sum(4 * int(np.prod(info.shape)) for info in model.tensors.values())
    expected = _logits(Transformer(model, backend.choose("numpy"), resident=False))
    engine = Transformer(model, backend.choose("numpy"))
    engine.weights = Weights(model, engine.backend, resident=True, free=int(3 * share * whole))
    for _ in range(3):
        np.testing.assert_array_equal(_logits(engine), expected)
    held = sum(array.nbytes for array in engine.weights._held.values())
    assert engine.weights.resident is (kept != "none")
    # A norm's weight may be missing from a full store; the rows of the embedding are taken from the file.
    assert {"all": held > 0.5 * whole, "some": 0 < held < share * whole, "none": held == 0}[kept]


def _logits(engine: Transformer) -> np.ndarray:
    return engine.forward(TOKENS, engine.start())
