"""Faults of the mask where a model sees later positions as well: an encoder's attention has no causal mask, and no cache."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from planted import PATIENT, Faulty, Planted, tokens_of

from checkpoints.rules import visible
from engine.faults import CATALOGUE, plant
from engine.graph import in_one_pass
from engine.inapplicable import NotApplicable
from engine.replay.replay import Replay
from parity.explain.explain import explain
from reference.client import Reference


@pytest.fixture(scope="module")
def engine(small_model: Callable[..., Path], reference: Reference) -> Faulty:
    """A small dream, whose attention sees all positions."""
    path = small_model("dream", layers=2)
    return Faulty(path, reference.graph(path))


@pytest.mark.parametrize(
    "name", ["no-causal-mask", "mask-by-product", "mask-shifted", "cache-not-read", "cache-row-missing", "cache-stale"]
)
def test_there_is_no_fault_of_a_cache_or_a_causal_mask(engine: Faulty, name: str) -> None:
    """What an encoder's attention does not have cannot be wrong in it: each of these would only have made it causal."""
    assert in_one_pass(engine.right)
    fault = CATALOGUE[name]
    with pytest.raises(NotApplicable):
        plant(
            engine.right,
            fault,
            None,
            **{key: values[0] for key, values in fault.parameters.items() if isinstance(values, tuple)},
        )


def test_chunks_of_an_encoder_see_their_later_positions(engine: Faulty) -> None:
    """A prompt that an encoder computes in chunks has the keys of a chunk at each of its positions, and none of another chunk."""
    tokens = tokens_of(engine.model, 9, 1)
    steps = plant(engine.right, CATALOGUE["mask-in-chunks"], (0,), mask="its own chunk of 4")
    count = len(tokens)
    run = Replay(steps, tokens, range(count), [0] * count, engine.transformer.weights, engine.transformer.backend)
    at = np.arange(count)
    wanted = visible(at, at, window="all", size=0) & (at[:, None] // 4 == at[None, :] // 4)
    assert ((np.asarray(run.values["blk.0.kq_soft_max"]) > 0) == wanted).all()


def test_a_causal_mask_in_one_layer_is_named(engine: Faulty) -> None:
    """A decoder's mask in one layer of a model that has none is that, and not a cache that is not read."""
    dump = engine.dump(Planted((("causal-mask-added", {}, (1,)),)), tokens_of(engine.model, 9, 1))
    answer = explain(dump, engine.model, PATIENT)
    assert answer.remaining is None
    assert [(cause.named.fault, cause.named.layers) for cause in answer.causes] == [("causal-mask-added", (1,))]
