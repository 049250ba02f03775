"""A number that no entry of the catalogue lists, found from what the first difference follows, with hardly any search."""

import pytest
from explaining import PROMPT, RIGHT, STEPS, names, small_engine, unstated
from msgspec.structs import replace
from planted import Faulty

from engine.backend import Array
from engine.faults.edits import Then
from parity.explain.explain import explain


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A qwen2 of four layers."""
    return small_engine(tmp_path_factory.mktemp("one-number"))


def _moved(x: Array) -> Array:
    return x + x.dtype.type(0.02)


@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize("layer", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_a_number_of_any_operation_is_a_cause_before_the_search(engine: Faulty, layer: int | None) -> None:
    """A constant added after RoPE, in all layers or in one, recorded only after each layer: named, and no arithmetic is made of it."""

    def wrong(name: str) -> bool:
        return name.endswith(".q_rope") if layer is None else name == f"blk.{layer}.q_rope"

    steps = [replace(step, op=Then(step.op, _moved)) if wrong(step.makes) else step for step in engine.right]
    explanation = explain(unstated(engine.dump(RIGHT, PROMPT, steps=steps)), engine.model, STEPS)
    assert (names(explanation), explanation.remaining, explanation.looks_like) == (["constant-added"], None, "")
    assert explanation.causes[0].named.parameters["by"] == pytest.approx(0.02, rel=1e-3)
    assert explanation.causes[0].named.layers == (None if layer is None else (layer,))
    assert explanation.variants < 200
