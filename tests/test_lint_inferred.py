"""What lint concludes from bare lines alone about values that a right engine repeats, each with a capture mistake beside it."""

from collections.abc import Mapping

import numpy as np
import pytest
from dumps import Arrays, dump, random
from msgspec.structs import replace

from checkpoints.record import Dump
from parity.lint.lint import lint
from parity.lint.model_facts import open_model
from parity.models.embedded import path as embedded


def _bare(arrays: Mapping[str, np.ndarray], prefill: int | None = None) -> Dump:
    whole = dump(arrays, header=None, slice_size=None, prefill=prefill)
    return replace(whole, end=None, points={name: replace(rows, stats={}, sketch=None) for name, rows in whole.points.items()})


def _rules(arrays: Arrays, prefill: int | None = None) -> set[str]:
    return {finding.rule for finding in lint(_bare(arrays, prefill)).findings}


def _attention(share: np.ndarray) -> np.ndarray:
    """Causal weights [8 heads, 8 positions, 8 keys] whose sums are `share` [positions, heads]."""
    scores = np.random.default_rng(0).standard_normal((8, 8, 8))
    weights = np.where(np.tril(np.ones((8, 8), bool))[:, None], np.exp(scores), 0)
    weights = weights / weights.sum(axis=-1, keepdims=True) * share[..., None]
    result: np.ndarray = weights.transpose(1, 0, 2).astype(np.float32)
    return result


@pytest.mark.parametrize(
    ("name", "suspected"),
    [
        ("sinks", False),
        ("one head without", False),
        ("one key of the prompt lacks", True),
        ("not divided", True),
        ("one position", True),
        ("one factor", True),
        ("a row of 32 keys read as several", True),
    ],
)
def test_weights_below_one_everywhere_may_be_those_of_sinks(name: str, suspected: bool) -> None:
    """Every record of attention with sinks has a head below 1 and none above; lost keys leave the first position's sum at 1."""
    share = np.random.default_rng(1).uniform(0.2, 0.9, (8, 8))
    if name == "one head without":
        share[:, 2] = 1
    elif name == "one key of the prompt lacks":
        share[0] = 1
    elif name == "not divided":
        share += 1
    elif name == "one position":
        share[:] = 1
        share[3] = 0.8
    elif name == "one factor":
        share[:] = 0.9
    weights = _attention(share)
    if name == "a row of 32 keys read as several":
        weights = _attention(np.ones((8, 8)))
        weights[1:] = 0
    assert ("attention-rows" in _rules(random(("embd", "blk.0.l_out"), 8) | {"blk.0.kq_soft_max": weights})) == suspected


@pytest.mark.parametrize(("layer", "suspected"), [(0, False), (2, True)])
def test_a_node_before_attention_may_show_the_token_before(layer: int, suspected: bool) -> None:
    """A token shift of the first layer has the same row wherever the token before is the same; behind attention that is stale."""
    arrays = random(("embd", "blk.0.l_out", f"blk.{layer}.concat", "blk.3.l_out"), positions=7)
    arrays["embd"][4] = arrays["embd"][0]
    arrays[f"blk.{layer}.concat"][5] = arrays[f"blk.{layer}.concat"][1]
    arrays["embd"][5] = arrays["embd"][2]
    assert ("stale-position" in _rules(arrays)) == suspected


@pytest.mark.parametrize(
    ("name", "suspected"),
    [("decay", False), ("steps", False), ("constant", True), ("other values", True), ("small values", True)],
)
def test_a_decay_by_place_begins_again_in_each_pass(name: str, suspected: bool) -> None:
    """Two decoded tokens have the first position's row where rows follow the place in the pass, not where values are the tokens'."""
    arrays = random(("embd", "blk.1.l_out", "blk.1.q_decay"), positions=8)
    place = np.array([0, 1, 2, 3, 4, 5, 0, 0])[:, None]
    rates = np.linspace(0.1, 0.9, 64)
    made = {"decay": np.exp(-rates * (place + 1)), "steps": rates * (place + 1), "constant": np.tile(rates, (8, 1))}
    arrays["blk.1.q_decay"] = made.get(name, arrays["blk.1.q_decay"][place[:, 0]]).astype(np.float32)
    if name == "small values":
        arrays["blk.1.q_decay"] *= np.float32(1e-6)
    assert ("stale-position" in _rules(arrays, prefill=6)) == suspected


@pytest.mark.parametrize("suspected", [False, True])
def test_layers_far_apart_may_norm_the_embedding_again(suspected: bool) -> None:
    """The embedding times one number, in two layers, is its norm computed twice; any other vector of two layers is a kept pointer."""
    arrays = random(("embd", "blk.0.norm", "blk.2.rms_norm", "blk.3.l_out"), positions=6)
    if not suspected:
        embd = arrays["embd"].astype(np.float64)
        arrays["blk.0.norm"] = (embd / np.sqrt((embd**2).mean(axis=1, keepdims=True))).astype(np.float32)
    arrays["blk.2.rms_norm"] = arrays["blk.0.norm"]
    assert ("same-vector" in _rules(arrays)) == suspected


@pytest.mark.parametrize(("stale", "difference"), [(False, 1e-7), (True, 0.0), (True, 0.01)])
def test_one_tokens_rows_may_differ_by_rounding_from_pass_to_pass(stale: bool, difference: float) -> None:
    """A node that follows the tokens does so although a decoded token's row is rounded otherwise; another token's row, and rows of one
    token that differ by more, are none that follow tokens.
    """
    arrays = random(("embd", "blk.1.q_rope", "blk.3.l_out"), positions=8)
    for name in ("embd", "blk.1.q_rope"):
        arrays[name][[3, 6]] = arrays[name][[0, 1]]
    arrays["blk.1.q_rope"][6] *= np.float32(1 + difference)
    if stale and not difference:
        arrays["blk.1.q_rope"][5] = arrays["blk.1.q_rope"][4]
    assert ("stale-position" in _rules(arrays, prefill=6)) == stale


@pytest.mark.parametrize("mixed", [True, False])
def test_a_final_norm_of_a_mixture_is_no_late_capture(mixed: bool) -> None:
    """Where a model mixes layers' outputs before its final norm, single positions are nearly one layer's. At all positions it is late."""
    facts = open_model(embedded())
    weight = facts.output_norm()
    assert weight is not None
    rng = np.random.default_rng(0)
    rows = {
        name: rng.standard_normal((6, len(weight))).astype(np.float32) for name in ("embd", "blk.0.l_out", "blk.23.l_out", "x")
    }
    final = rows.pop("x")
    final[[4] if mixed else slice(None)] = rows["blk.0.l_out"][[4] if mixed else slice(None)]
    rows["output_norm"] = (final / np.sqrt((final**2).mean(axis=1, keepdims=True)) * weight).astype(np.float32)
    assert ("captured-late" in {finding.rule for finding in lint(_bare(rows), facts).findings}) == (not mixed)
