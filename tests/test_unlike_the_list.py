"""Files of qwen2 and llama with other tensors than their written lists read: they are computed from llama.cpp's graph."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cli import Cli
from msgspec.structs import replace

from engine.models import written_by_hand
from engine.synth.recipe import shape_of
from engine.synth.recipes import recipe
from engine.weights.gguf_model import GgufModel
from parity.isolate.isolate import IsolateRequest, isolate
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

TOKENS = (11, 48, 85, 122, 159)


@pytest.mark.parametrize("name", ["llama-yarn", "qwen2-yarn"])
def test_a_fused_projection_is_the_graphs(name: str, parity: Cli, reference: Reference, tmp_path: Path) -> None:
    """Q, K and V in one tensor are no list's: the model is parity, and every operation of it is proven."""
    chosen = replace(recipe(name), fused_qkv=True)
    path = tmp_path / "fused.gguf"
    settings = {"rope.scaling.type": "none"}
    make_by_recipe(path, chosen, shape_of(chosen, layers=2), settings, kind="f32", running=reference)
    model = GgufModel(path)
    assert not model.hyperparameters.irregular
    assert not written_by_hand(model.hyperparameters, model.tensors)
    ran = parity("run", "--model", path, "--points", "all", "--tokens", ",".join(map(str, TOKENS)), "--out", tmp_path / "out")
    assert ran.code == 0, ran.out + ran.err
    isolation = isolate(IsolateRequest(path, tokens=TOKENS), reference)
    assert isolation
    assert not [item for item in isolation.operations if item.status != "proven"]


def test_qwen2_without_biases(parity: Cli, synthetic: Callable[..., Path]) -> None:
    """Biases are where the file has them, in qwen2 as in llama."""
    path = synthetic(biases=False)
    model = GgufModel(path)
    assert not any(name.endswith(".bias") for name in model.tensors)
    assert written_by_hand(model.hyperparameters, model.tensors)
    ran = parity("run", "--model", path, "--tokens", "1,2,3", "--out", path.with_suffix(""))
    assert ran.code == 0, ran.out + ran.err
