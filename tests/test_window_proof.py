"""Windows of any architecture: identical to the whole model to the byte, or refused in one line before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slow import slow_but

from checkpoints.errors import InputError, ReferenceFailed
from engine.synth.recipes import RECIPES
from reference.client import Reference
from reference.jobs import EXACT, NATIVE, DumpJob

TOKENS = (5, 77, 300, 5, 901, 1204)


def slow(*values: str) -> Any:
    """A case that runs with the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


def records(path: Path) -> dict[tuple[Any, ...], Any]:
    """Every line but the header, by what it is of."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        (line.get("type"), line.get("checkpoint"), line.get("token_idx"), line.get("step")): line
        for line in lines
        if line.get("type") not in ("header", "end")
    }


def both(reference: Reference, model: Path, folder: Path, mode: str = EXACT, window: int = 1) -> None:
    """The dump of all points by windows is the dump of the whole model."""
    dumps = [folder / "windows.jsonl", folder / "whole.jsonl"]
    for out, size in zip(dumps, (window, "off"), strict=True):
        reference.dump(DumpJob(model, out, TOKENS, points="all", window=size, generate=1, mode=mode))
    windows, whole = map(records, dumps)
    assert windows == whole


@pytest.mark.parametrize("name", slow_but(["qwen2moe", "phi3"], "phi3"))
def test_windows_are_the_whole_model(reference: Reference, small_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Where nothing depends on a layer's number; qwen2moe needs an output matrix beside its embedding."""
    both(reference, small_model(name, layers=3), tmp_path)


@pytest.mark.slow
def test_windows_of_quantised_experts(reference: Reference, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """In native mode, by windows of two layers, of which the last has one."""
    both(reference, small_model("qwen3moe", "q8_0", layers=3), tmp_path, NATIVE, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma", r"SCALE \(inp_scaled\), which comes before the layers, would be applied to the hidden state again"),
        slow("gpt2", r"GET_ROWS \(pos_embd\), which comes before the layers, would be applied"),
        slow("granite", "would be applied to the hidden state again"),
        ("gemma2", "its layers attend through different masks"),
        ("smollm3", "in layer [0-9] is built differently if the layer is computed on its own"),
        slow("deepseek2", "llama.cpp loads no layer 1 of it"),
        slow("bert", "it is not a decoder only"),
        ("lfm2", "has only attention, or none"),
        slow("qwen2vl", "its positions have several axes"),
    ],
)
def test_what_is_not_the_whole_model_is_refused(
    reference: Reference, small_model: Callable[..., Path], tmp_path: Path, name: str, message: str
) -> None:
    """The line names what differs, and no dump is begun."""
    with pytest.raises(InputError, match=f"{name} cannot be computed window by window: .*{message}"):
        reference.dump(DumpJob(small_model(name), tmp_path / "windows.jsonl", TOKENS, window=1))
    assert not list(tmp_path.iterdir())


def test_layers_fed_with_a_hidden_state_are_proven_too(reference: Reference, small_model: Callable[..., Path]) -> None:
    """gemma's first layer would scale the hidden state again, so would its second; qwen3's layers are those of the whole."""
    with pytest.raises(InputError, match="applied to the hidden state again"):
        list(reference.layers(small_model("gemma"), 1, 2, np.ones((3, 128), np.float32)))
    model = small_model("qwen3")
    whole = {node.point: value for node, value in reference.capture(model, TOKENS)}
    for node, value in reference.layers(model, 0, 2, whole["embd"]):
        np.testing.assert_array_equal(value, whole[node.point], err_msg=node.point)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_windows_of_every_architecture(
    reference: Reference, small_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """Windows of one layer of every recipe's model are the whole model to the byte, or refused."""
    refusal = ""
    try:
        both(reference, small_model(name), tmp_path)
    except (InputError, ReferenceFailed) as error:  # glm4: ggml ends the process where the hidden state is given
        refusal = error.message
    reasons = ("cannot be computed window by window", "cannot generate tokens", "llama.cpp aborted while computing")
    assert not refusal or any(reason in refusal for reason in reasons)
    assert not refusal or "aborted" in refusal or not list(tmp_path.iterdir())
