"""The sweeps' kept runs stand in for the product's own functions, call for call."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.replay import precision
from engine.replay.disturbed import disturbed
from engine.replay.wide import values_of

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from kept_runs import KeptRuns


@pytest.mark.parametrize(
    ("product", "kept"),
    [(precision.rounded, KeptRuns.rounded), (disturbed, KeptRuns.disturbed), (values_of, KeptRuns.values_of)],
)
def test_a_kept_function_takes_what_the_product_gives_it(product: Callable[..., Any], kept: Callable[..., Any]) -> None:
    """An argument that a command has begun to give ended each judgement of a sweep in a TypeError."""
    wanted, taken = (list(inspect.signature(function).parameters) for function in (product, kept))
    assert taken == ["self", *wanted]
