"""Models that go through their blocks several times in a pass: each time is a layer, with points and a cache of its own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, refused
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, tokens_of

from checkpoints.points import OUTPUT_NORM, parse
from engine.faults import CATALOGUE
from parity.explain.explain import explain
from reference.client import Reference

TOKENS = "5,77,300,5,901"
Make = Callable[..., Path]


@pytest.fixture(scope="module", params=["nanbeige-loops", pytest.param("hrm_text", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, small_model: Make) -> Path:
    """Two blocks twice with a norm between; two stacks, of which the first is computed twice as often."""
    return small_model(request.param, layers=1)


def test_each_time_is_a_layer(reference: Reference, model: Path) -> None:
    """No name occurs twice, every layer has the same points from `q` to `l_out`, and sums are those of their own layer."""
    taken = list(reference.capture(model, (5, 77, 300)))
    nodes = {node.point: value for node, value in taken}
    assert len(nodes) == len(taken)
    kinds: dict[int, set[str]] = {}
    for name in nodes:
        if (layer := parse(name).layer) is not None:
            kinds.setdefault(layer, set()).add(parse(name).kind)
    assert sorted(kinds) == list(range(2 if len(kinds) == 2 else 6))
    common = {"attn_norm", "q", "k", "v", "q_rope", "k_rope", "kq", "attn_out", "ffn_inp", "ffn_norm", "ffn_out", "l_out"}
    for layer, names in kinds.items():
        assert common <= names
        total = nodes[f"blk.{layer}.ffn_inp"] + nodes[f"blk.{layer}.ffn_out"]
        np.testing.assert_allclose(nodes[f"blk.{layer}.l_out"], total, rtol=1e-5, atol=1e-6)
    assert OUTPUT_NORM in nodes


def test_every_point_agrees(parity: Cli, model: Path) -> None:
    """Prompt and generated tokens at every point, and what was recorded has no lint."""
    ran = parity(
        "run", "--model", model, "--tokens", TOKENS, "--generate", "2", "--points", "all", "--out", "out", "--format", "json"
    )
    assert ran.json["verdict"] == "parity"
    for side in ("ours", "ref"):
        assert parity("lint", f"out/{side}.jsonl", "--model", model).code == 0


@pytest.mark.slow
def test_each_operation_and_other_portions(parity: Cli, model: Path) -> None:
    """Every operation of every time is proven by itself, and the cache of each time keeps what later passes read."""
    assert parity("isolate", "--model", model, "--tokens", TOKENS).code == 0
    assert parity("consistency", "--model", model, "--tokens", TOKENS).code == 0


def test_the_last_of_the_default_layers_is_the_last_time(parity: Cli, model: Path) -> None:
    """Default points reach the end of the pass, and the header counts each time as a layer."""
    last = parity("dump", "ours", "--model", model, "--tokens", TOKENS, "-o", "ours.jsonl", "--points", "default")
    assert last.code == 0
    lint = parity("lint", "ours.jsonl", "--model", model)
    assert lint.code == 0
    assert "clean" in lint.out


def test_no_windows(parity: Cli, model: Path) -> None:
    """A window of one layer cannot say which time it is: one line."""
    asked = parity("dump", "ref", "--model", model, "--tokens", TOKENS, "--window", "1", "-o", "ref.jsonl")
    refused(asked, "blocks of weights")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("transposed", (1,)), ("layer-offset", None)])
def test_a_fault_is_named(reference: Reference, small_model: Make, name: str, layers: tuple[int, ...] | None) -> None:
    """In one of the times, and another layer's weights in all of them."""
    path = small_model("nanbeige-loops")
    engine = Faulty(path, reference.graph(path))
    tokens = tokens_of(path, 14, seed=5)
    parameters = CATALOGUE[name].variants({step.makes: step for step in engine.right})[0]
    explanation = explain(engine.dump(Planted(((name, parameters, layers),)), tokens), path, replace(PATIENT, tokens=tokens))
    assert [cause.named.fault for cause in explanation.causes] == [name]
