"""Bugs of public trackers, planted by hand, are named by `parity explain` from the default points."""

from collections.abc import Callable
from pathlib import Path

import pytest
from further_public_bugs import FURTHER
from latest_public_bugs import LATEST
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, tokens_of
from ported_bugs import PORTED
from public_bugs import BUGS
from slow import slow_but

from parity.explain.explain import explain
from reference.client import Reference

_QUICK = ("RoPE in BERT",)
_ALL = {**BUGS, **FURTHER, **LATEST, **PORTED}


@pytest.fixture(scope="module")
def faulty(reference: Reference, small_model: Callable[..., Path]) -> Callable[[str], Faulty]:
    """The engine of a recipe's model, lifted from llama.cpp's graph."""
    engines: dict[str, Faulty] = {}

    def of(recipe: str) -> Faulty:
        if recipe not in engines:
            model = small_model(recipe)
            engines[recipe] = Faulty(model, reference.graph(model))
        return engines[recipe]

    return of


@pytest.mark.parametrize("name", slow_but(_ALL, *_QUICK))
def test_each_bug_is_named(faulty: Callable[[str], Faulty], name: str) -> None:
    """Sixteen values a record are enough to name the bug, or one with the same numbers, and nothing else."""
    bug = _ALL[name]
    engine = faulty(bug.recipe)
    tokens = tokens_of(engine.model, 14, seed=5)
    dump = engine.dump(Planted(()), tokens, steps=bug.planted(engine.right), generated=bug.generated)
    explanation = explain(dump, engine.model, replace(PATIENT, tokens=tokens))
    assert explanation.remaining is None
    assert [bug.named in {cause.named.fault, *(other.fault for other in cause.equivalent)} for cause in explanation.causes] == [
        True
    ]
