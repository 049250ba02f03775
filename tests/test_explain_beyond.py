"""What `parity explain` finds beyond an arithmetic that nothing states."""

from pathlib import Path

import pytest
from explaining import unstated
from planted import PATIENT, Faulty, Planted, tokens_of

from engine.replay.precision import rounded
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.explain.explain import explain
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference


@pytest.mark.slow
def test_a_cause_beyond_an_arithmetic_leaves_what_is_allowed_where_it_is_stated(
    reference: Reference, stories: Path, tmp_path: Path
) -> None:
    """An engine with 8-bit activations that states nothing, with a shifted cache: scores are further off than others, and no further than
    stated 8 bits may be, so that the cache is named and not the first rounding.
    """
    model, chosen = tmp_path / "model.gguf", RECIPES["gpt2"]
    make_by_recipe(model, chosen, shape_of(chosen), {}, kind="f16", seed=9601, tokenizer=stories, running=reference)
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 7, seed=9601)
    steps = Planted((("cache-shifted", {"by": 1, "at": ("k_read", "v_read")}, None),)).steps(engine.right)
    dump = engine.dump(Planted(()), tokens, points="*", size=1 << 20, steps=rounded(steps, "q8", storage=True), bare=False)
    explanation = explain(unstated(dump), model, PATIENT)
    assert [cause.named.fault for cause in explanation.causes] == ["cache-shifted"]
    assert explanation.remaining is None
