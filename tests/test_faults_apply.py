"""A fault is planted or says that it does not apply: nothing else comes out of one, and what does is a bug that is seen."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from explaining import only, small_engine

from checkpoints.gguf_file import contents, header_bytes
from checkpoints.long_factors import LONG, SHORT
from engine.backend import choose
from engine.faults import CATALOGUE, Fault, Planting, plant
from engine.graph import Step
from engine.inapplicable import NotApplicable
from engine.opened import open_plain
from engine.replay.replay import Replay
from engine.synth import Shape, synthesize
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.explain.explain import explain
from reference.client import Reference

# Head counts and widths that do not divide each other, one layer only, no biases, frequency factors, block formats.
MODELS = {
    "odd": (Shape("llama", 2, 60, 5, 1, 0, 36, 33, biases=False), "f32"),
    "one layer": (Shape("llama", 1, 64, 1, 1, 0, 48, 50, biases=False), "bf16"),
    "factors": (Shape("llama", 2, 96, 4, 2, 32, 160, 90, biases=False, rope_factors=True, rope_scaling=4.0), "f16"),
    "blocks": (Shape("qwen2", 2, 128, 4, 2, 0, 96, 90), "q4_1"),
}
Chosen = tuple[Fault, Mapping[str, Any]]


def _run(right: Replay, steps: list[Step], chosen: tuple[Chosen, ...], layers: tuple[int, ...] | None) -> bool:
    """Whether these faults, one on the other, apply."""
    try:
        for fault, parameters in chosen:
            steps = Planting(steps).of(fault, layers, parameters)
        right.run(steps, lambda _name, _made: True)
    except NotApplicable:
        return False
    return True


@pytest.mark.parametrize("name", MODELS)
def test_faults_apply_or_say_that_they_do_not(name: str, tmp_path: Path) -> None:
    """Every variant of the catalogue alone, and 300 seeded pairs of them, in all layers and in the first one alone."""
    shape, kind = MODELS[name]
    synthesize(tmp_path / "model.gguf", shape, weight_type=kind, seed=3)
    engine = Transformer(GgufModel(tmp_path / "model.gguf"), choose("numpy"))
    tokens = [*((7 * i + 3) % shape.vocab for i in range(8)), shape.vocab - 1]  # the last id has no next one
    right = Replay(engine.steps, tokens, range(9), [0] * 6 + [1, 2, 3], engine.weights, engine.backend)
    steps = list(engine.steps)
    every = [(fault, chosen) for fault in CATALOGUE.values() for chosen in fault.variants(Planting(steps).right)]
    draw = random.Random(4)
    for layers in (None, (0,)):
        assert sum(_run(right, steps, (one,), layers) for one in every) > len(every) // 3
        assert sum(_run(right, steps, (draw.choice(every), draw.choice(every)), layers) for _ in range(150)) > 10


def test_a_bug_in_a_fault_is_no_fault_that_does_not_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that looks up a step by a wrong name ends the search with its KeyError."""
    engine = small_engine(tmp_path)

    def change(_step: Step, right: Mapping[str, Step], _parameters: Mapping[str, Any]) -> Step:
        return right["blk.0.no_such_point"]

    broken = replace(next(iter(CATALOGUE.values())), name="broken", kinds=("attn_norm",), change=change, parameters={})
    monkeypatch.setitem(CATALOGUE, "broken", broken)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no_such_point"):
        explain(only(engine, ("activation", {"activation": "ReLU"}, (2,))), engine.model)
    with pytest.raises(NotApplicable):
        plant(engine.right, CATALOGUE["rope-base"], (), base=1.0)


@pytest.mark.parametrize("lacking", [SHORT, LONG])
def test_factors_of_one_length_have_no_others(
    lacking: str, small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """A file with one of the two sets of frequency factors, which llama.cpp takes, has no fault of the other set."""
    settings = {"rope.scaling.original_context_length": 4096 if lacking == LONG else 256}
    whole = contents(small_model("phi3-longrope", layers=1, context=8192, settings=settings))
    infos, data = [], b""
    for tensor, after in zip(whole.tensors, [*(tensor.offset for tensor in whole.tensors[1:]), None], strict=True):
        if tensor.name != lacking:
            infos.append(replace(tensor, offset=len(data)))
            data += whole.path.read_bytes()[whole.data :][tensor.offset : after]
    path = tmp_path / "model.gguf"
    path.write_bytes(header_bytes(whole.metadata, infos) + data)
    engine = Transformer(GgufModel(path), choose("numpy"), recorded=reference.graph(path))
    right = Replay(engine.steps, [1, 2, 3], range(3), [0] * 3, engine.weights, engine.backend)
    steps = plant(engine.steps, CATALOGUE["rope-factors-of-other-length"])
    with pytest.raises(NotApplicable, match=f"the file has no {lacking}"):
        right.run(steps, lambda _name, _value: True)


@pytest.mark.slow
def test_positions_moved_beyond_their_table_do_not_apply(small_model: Callable[..., Path], reference: Reference) -> None:
    """A prompt that fills the context: its last position has no next row, while one row back is there for every position."""
    model = small_model("gpt2", layers=1, context=8)
    engine = open_plain(GgufModel(model), "numpy", recorded=partial(reference.graph, model))
    engine.expect(8)
    right = Replay(engine.steps, [5] * 8, range(8), [0] * 8, engine.weights, engine.backend)
    fault = CATALOGUE["position-rows-shifted"]
    assert _run(right, list(engine.steps), ((fault, {"by": "minus one row"}),), None)
    assert not _run(right, list(engine.steps), ((fault, {"by": "one row"}),), None)
