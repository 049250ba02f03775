"""Entries with a number that is fitted: the number acts, whichever it is, and the right one changes nothing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from slow import slow_but

from engine.faults import FITTED, Planting
from engine.faults.fitted import Fitted
from engine.graph import Step
from engine.inapplicable import NotApplicable
from engine.opened import open_plain
from engine.replay.replay import Replay
from engine.weights.gguf_model import GgufModel
from reference.client import Reference

TOKENS = (5, 17, 200, 31, 8, 17, 99)
IDLE = ("activation-clamped",)  # a bound that no activation of random weights reaches
RECIPES = ("mpt", "gemma2", "granitemoe", "deepseek2", "phi3-longrope", "falcon-h1", "qwen3next", "gpt-oss")

Values = dict[str, NDArray[np.floating[Any]]]


@pytest.mark.parametrize("recipe", slow_but(RECIPES, "mpt", "gemma2"))
def test_the_number_of_an_entry_acts(recipe: str, small_model: Callable[..., Path], reference: Reference) -> None:
    """Two numbers make different values, and the model's own leaves every value as it was: an ALiBi of another size once made the same
    wrong slopes whatever the number was."""
    path = small_model(recipe)
    engine = open_plain(GgufModel(path), "numpy", recorded=partial(reference.graph, path))
    count = len(TOKENS)
    replay = Replay(engine.steps, TOKENS, range(count), [0] * count, engine.weights, engine.backend)
    planting = Planting(list(engine.steps))

    def values(steps: list[Step]) -> Values:
        made: Values = {}
        replay.run(steps, lambda name, value: made.update({name: np.array(value)}) is None)
        return made

    def planted(fit: Fitted, parameters: dict[str, Any], number: float) -> Values | None:
        try:
            return values(planting.of(fit.fault, None, {**parameters, fit.parameter: number}))
        except NotApplicable:
            return None

    right = values(list(engine.steps))
    tried = 0
    for fit in FITTED:
        if fit.fault.name in IDLE or fit.of_row:
            continue
        for parameters in fit.variants(planting.right)[:2]:
            wanted = fit.wanted(planting.right, parameters)
            starts = fit.starts(wanted or 0.0)
            one, other = planted(fit, parameters, starts[0]), planted(fit, parameters, starts[-1])
            if one is None or other is None or starts[0] == starts[-1]:
                continue
            tried += 1
            said = f"{fit.fault.name} {parameters}"
            assert any(not np.array_equal(value, other[name], equal_nan=True) for name, value in one.items()), said
            same = (None if wanted is None else planted(fit, parameters, wanted)) or {}
            for name in right.keys() & same.keys():
                assert same[name] == pytest.approx(right[name], rel=1e-4, abs=1e-4, nan_ok=True), f"{said} at {name}"
    assert tried > 5
