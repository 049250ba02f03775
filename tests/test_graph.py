"""The recorded graph: it is valid for every length, its inputs follow proven rules, and it can be stored."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from checkpoints.errors import DumpError
from checkpoints.graph import INPUT, WEIGHT, InputRule, RecordedGraph, Size
from checkpoints.rules import ForwardPass, Recorded, explain
from reference.client import Reference

Make = Callable[..., Path]


def rules(recorded: RecordedGraph) -> list[InputRule | None]:
    """The rules of the inputs, in their order."""
    return [tensor.rule for tensor in recorded.several.tensors if tensor.kind == INPUT]


def test_sizes_follow_the_length(reference: Reference, small_model: Make) -> None:
    """T and the cache's length are symbols in shapes and strides; weights have none, and bear their GGUF names."""
    recorded = reference.graph(small_model("qwen3", layers=2))
    by_point = {tensor.point: tensor for tensor in recorded.several.tensors if tensor.point}
    scores = by_point["blk.1.kq"]
    assert (scores.ne[0], scores.ne[1], scores.ne[2]) == (Size(0, 0, 1), Size(0, 1), Size(4))
    assert scores.nb[2] == Size(0, 0, 0, 4)
    assert scores.position_axis == 1
    assert scores.operand_points == {0: "blk.1.k_read"}
    assert by_point["blk.0.l_out"].position_axis == 1
    weights = {tensor.name for tensor in recorded.several.tensors if tensor.kind == WEIGHT}
    assert "blk.1.attn_q_norm.weight" in weights
    assert recorded.single is None  # a step over one token is the same graph


def test_two_masks_are_told_apart(reference: Reference, small_model: Make) -> None:
    """gemma3's windowed and full attention have inputs of one name and two rules; the window's size is read off the mask."""
    recorded = reference.graph(small_model("gemma3", settings={"attention.sliding_window": 8}))
    masks = [rule.parameters for rule in rules(recorded) if rule is not None and rule.kind == "mask"]
    assert sorted((mask["window"], mask["size"]) for mask in masks) == [("causal", 0), ("standard", 8)]


@pytest.mark.parametrize(
    ("architecture", "settings", "wanted"),
    [
        ("llama4", {}, ("chunked", 8192)),
        ("cohere2", {"attention.sliding_window": 20_000}, ("standard", 20_000)),
        ("modern-bert", {"attention.sliding_window": 600}, ("symmetric", 600)),
        ("step35", {"attention.sliding_window": 300}, ("standard", 300)),  # whose cached positions llama.cpp cannot move
    ],
)
def test_a_window_longer_than_the_recorded_passes(
    reference: Reference, small_model: Make, architecture: str, settings: dict[str, int], wanted: tuple[str, int]
) -> None:
    """The far edge of a long window is seen by a pass that crosses it, and so is of which kind the window is."""
    recorded = reference.graph(small_model(architecture, layers=4, settings=settings))
    assert recorded.longest is None
    masks = [rule.parameters for rule in rules(recorded) if rule is not None and rule.kind == "mask"]
    assert wanted in [(mask["window"], mask["size"]) for mask in masks]
    assert None not in rules(recorded)


def test_windows_in_every_layer(reference: Reference, small_model: Make) -> None:
    """Without a layer of whole attention llama.cpp's positions cannot be moved: the window is filled, where that can be afforded."""
    recorded = reference.graph(small_model("gemma3", layers=3, settings={"attention.sliding_window": 600}))
    masks = [rule.parameters for rule in rules(recorded) if rule is not None and rule.kind == "mask"]
    assert [(mask["window"], mask["size"]) for mask in masks] == [("standard", 600)]


def test_a_window_whose_edge_cannot_be_reached(reference: Reference, small_model: Make) -> None:
    """A prompt that may be longer than a window which was not seen is refused; shorter ones are computed."""
    from checkpoints.errors import InputError
    from engine.backend import choose
    from engine.transformer import Transformer
    from engine.weights.gguf_model import GgufModel

    model = small_model("step35", layers=4, context=80_000, settings={"attention.sliding_window": 40_000})
    recorded = reference.graph(model)
    assert recorded.longest == 20_000
    engine = Transformer(GgufModel(model), choose("numpy"), recorded=recorded)
    engine.check([1] * 20_000, 0)
    with pytest.raises(InputError, match="only 20,000 positions were"):
        engine.check([1] * 20_001, 0)


@pytest.mark.slow
@pytest.mark.parametrize("original", [128, 256])
def test_long_factors_follow_the_context(reference: Reference, small_model: Make, tmp_path: Path, original: int) -> None:
    """Where a file has two sets of RoPE factors, ours are those that llama.cpp takes for a run of that length."""
    from engine.backend import choose
    from engine.transformer import Transformer
    from engine.weights.gguf_model import GgufModel

    model = small_model("phi3-longrope", layers=1, settings={"rope.scaling.original_context_length": original})
    engine = Transformer(GgufModel(model), choose("numpy"), recorded=reference.graph(model))
    for count in (5, 257):
        tokens = tuple(range(3, 3 + count))
        [(_, theirs)] = reference.capture(model, tokens, "logits")
        engine.expect(count)
        ours = engine.forward(tokens, engine.start())
        assert np.square(ours - theirs[-1]).sum() < 1e-9 * np.square(theirs[-1]).sum()


def test_scales_that_grow_with_the_position(reference: Reference, small_model: Make) -> None:
    """Attention's temperature is proven at positions at which it is not 1."""
    kinds = {rule.kind for rule in rules(reference.graph(small_model("mistral3", layers=1))) if rule is not None}
    assert "temperature" in kinds


def test_a_step_over_one_token_that_is_built_otherwise(reference: Reference, small_model: Make) -> None:
    """Where llama.cpp computes a single token in another way, that graph is recorded as well."""
    recorded = reference.graph(small_model("mamba", layers=1))
    assert recorded.of(5) is recorded.several
    assert recorded.of(1) is (recorded.single or recorded.several)


def test_it_is_data(reference: Reference, small_model: Make) -> None:
    """Through JSON and back it is the same; damage is one clear line."""
    recorded = reference.graph(small_model("mixtral", layers=1))
    data = json.loads(json.dumps(recorded.to_json()))
    assert RecordedGraph.from_json(data) == recorded
    for damage in ({**data, "format": 99}, {**data, "several": None}, {**data, "several": [{"name": "x"}]}, {}):
        with pytest.raises(DumpError) as error:
            RecordedGraph.from_json(damage)
        assert error.value.advice
    beyond = [dict(tensor) for tensor in data["several"]]
    beyond[-1]["sources"] = [10**6]
    with pytest.raises(DumpError, match="damaged"):
        RecordedGraph.from_json({**data, "several": beyond})


def test_nothing_is_left_behind(reference: Reference, small_model: Make) -> None:
    """Recording twice gives the same, and a capture afterwards sees the values that it sees without it."""
    model = small_model("qwen3", layers=2)
    before = {node.point: value for node, value in reference.capture(model, (5, 6, 7), "logits")}
    assert reference.graph(model) == reference.graph(model)
    after = {node.point: value for node, value in reference.capture(model, (5, 6, 7), "logits")}
    np.testing.assert_array_equal(before["logits"], after["logits"])


def recorded_mask(window: str, size: int, first: int, count: int, *, spoil: bool = False) -> Recorded:
    """A mask over all positions up to first + count, as llama.cpp would give it."""
    positions, keys = np.arange(first, first + count), np.arange(first + count)
    distance = positions[:, None] - keys[None, :]
    seen = distance >= 0
    if window == "standard":
        seen &= distance < size
    elif window == "chunked":
        seen &= keys[None, :] >= positions[:, None] // size * size
    elif window == "symmetric":
        seen = abs(distance) <= size // 2
    elif window == "all":
        seen = np.ones_like(seen)
    mask = np.where(seen, np.float32(0), np.float32(-np.inf))
    if spoil:
        mask[0, 0] = 1
    return Recorded(ForwardPass(positions, positions, keys), (len(keys), count, 1, 1), mask.reshape(-1))


@pytest.mark.parametrize("window", ["causal", "all", "standard", "chunked", "symmetric"])
def test_every_kind_of_window_is_found(window: str) -> None:
    """Kind and size of a window are read off masks that cross its edge; a mask that no rule gives has none."""
    passes = [recorded_mask(window, 6, first, 5) for first in (0, 15, 20)]
    explanation = explain(passes, {})
    assert explanation is not None
    assert explanation.parameters["window"] == window
    if window in ("standard", "chunked", "symmetric"):
        assert explanation.parameters["size"] == 6
    assert explain([*passes, recorded_mask(window, 6, 25, 5, spoil=True)], {}) is None


def test_inputs_of_ids_are_told_apart() -> None:
    """Token ids, positions, rows and cells are different rules; what is none of them has none."""
    now = ForwardPass(np.array([9, 4, 7]), np.array([12, 13, 14]), np.arange(10, 15))
    cases = {"tokens": now.tokens, "positions": now.positions, "rows": np.arange(3), "cells": np.array([2, 3, 4])}
    for kind, data in cases.items():
        explanation = explain([Recorded(now, (3, 1, 1, 1), data.astype(np.int32))], {})
        assert explanation == InputRule(kind)
    assert explain([Recorded(now, (3, 1, 1, 1), np.array([1, 1, 2], np.int32))], {}) is None


def test_decays_of_lightning_attention() -> None:
    """Slopes of heads and their products with distances in the pass, as llama.cpp lays them out; the wrong end is not taken for the
    right one."""
    slope, tokens = 2.0 ** -np.array([2, 4, 6, 8]), 5
    now = ForwardPass(np.arange(tokens) + 90, np.arange(tokens) + 3, np.arange(tokens + 3))
    row = np.arange(tokens)
    pair = np.where(row[:, None] >= row, -slope[:, None, None] * (row[:, None] - row), -np.inf)
    for data, ne, rule in (
        (slope, (4, 1, 1, 1), InputRule("slopes", {"heads": 4})),
        (-slope * (row + 1)[:, None], (1, 4, tokens, 1), InputRule("decay", {"heads": 4, "of": "query"})),
        (-slope * (tokens - 1 - row)[:, None], (1, 4, tokens, 1), InputRule("decay", {"heads": 4, "of": "key"})),
        (pair, (tokens, tokens, 4, 1), InputRule("decay", {"heads": 4, "of": "pair"})),
        (-slope * (row + 2)[:, None], (1, 4, tokens, 1), None),
    ):
        assert explain([Recorded(now, ne, data.astype(np.float32).reshape(-1))], {}) == rule


def test_an_input_without_a_rule_is_refused_by_name(reference: Reference, small_model: Make) -> None:
    """The engine computes nothing from an input that it cannot explain."""
    from checkpoints.errors import ModelError
    from engine.lift import lift

    recorded = reference.graph(small_model("qwen3", layers=1))
    tensors = tuple(replace(tensor, rule=None) if tensor.name == "inp_pos" else tensor for tensor in recorded.several.tensors)
    with pytest.raises(ModelError, match=r"ROPE at blk\.0\.q_rope of qwen3: its input inp_pos"):
        lift(replace(recorded, several=replace(recorded.several, tensors=tensors)))
