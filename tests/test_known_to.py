"""A fitted number is said as precisely as its fit shows it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from planted import Faulty, Planted, tokens_of

from engine.faults import FITTED, plant
from parity.explain.explain import ExplainOptions, explain
from parity.explain.findings.known_to import KNOWN_TO
from reference.client import Reference


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "by"), [("gemma2", 0.76971), ("granite", 0.76971)])
def test_the_right_number_lies_within_what_is_said(
    recipe: str, by: float, small_model: Callable[..., Path], reference: Reference
) -> None:
    """Behind ggml's table of GELU the fit stops at another number, and the answer says how far off that may be; beside SwiGLU, which is no
    table, the number is right to its last digit and nothing is said.
    """
    path = small_model(recipe)
    faulty = Faulty(path, reference.graph(path))
    multiplied = next(fit.fault for fit in FITTED if fit.fault.name == "multiplier" and "part" in fit.fault.parameters)
    steps = plant(list(faulty.right), multiplied, None, by=by, part="the result", at=("ffn_gate",))
    dump = faulty.dump(Planted(()), tokens_of(path, 7, 190063), points="default", size=16, steps=steps)
    answer = explain(dump, path, ExplainOptions(budget=20.0))
    named = answer.causes[0].named
    assert named.fault == "multiplier"
    said = re.search(rf"{re.escape(KNOWN_TO)} (\S+)", named.sentence)
    if recipe == "granite":
        assert named.parameters["by"] == pytest.approx(by, rel=2e-5)
        assert said is None
    else:
        assert said is not None
        assert abs(float(named.parameters["by"]) - by) <= float(said[1])
