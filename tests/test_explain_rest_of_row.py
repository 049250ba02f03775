"""`parity explain` says whether a law of the recorded elements holds for the rest of their rows, of which a sketch shows the error."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, small_engine
from msgspec.structs import replace
from planted import PATIENT, Faulty

from engine.backend import Array
from parity.explain.explain import explain

_ALONE = "in the 16 recorded of 112 elements (the rest of the row does not follow, as its sketch shows) "


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2."""
    return small_engine(tmp_path_factory.mktemp("rest-of-row"))


def _law(engine: Faulty, change: Callable[[Array], None], *, bare: bool = False) -> str:
    """The law of an engine that changes its first norm's values, of which sixteen are recorded."""

    def changed(own: Callable[..., Array], *inputs: Any, **params: Any) -> Array:
        value = own(*inputs, **params).copy()
        change(value)
        return value

    steps = [replace(step, op=partial(changed, step.op)) if step.makes == "blk.0.attn_norm" else step for step in engine.right]
    dump = engine.dump(RIGHT, PROMPT, points="*", steps=steps, bare=bare)
    return explain(dump, engine.model, replace(PATIENT, tokens=PROMPT)).law


def _half(value: Array) -> None:
    value[:, :56] *= np.float32(1.01)


def _whole(value: Array) -> None:
    value *= np.float32(1.01)
    value += np.float32(0.5)


def _sign(value: Array) -> None:
    value[:, 5] *= np.float32(-1)


def _sign_and_end(value: Array) -> None:
    _sign(value)
    value[:, 100:] = 0


def test_a_factor_of_half_a_row_is_one_of_the_recorded_elements(engine: Faulty) -> None:
    """Elements 0 to 55 times 1.01, of which sixteen were recorded, are not said to be the whole row; without a sketch nothing tells."""
    assert _law(engine, _half) == f"{_ALONE}every element is 1.01 times the right one"
    assert _law(engine, _half, bare=True) == "every element is 1.01 times the right one"


def test_a_law_of_the_whole_row_is_said_of_every_element(engine: Faulty) -> None:
    """Two numbers that make the whole row's sketch as well need no word on what was not recorded."""
    assert _law(engine, _whole).startswith("every element is 1.01 times the right one plus 0.5")


def test_the_others_are_right_where_the_sketch_says_so(engine: Faulty) -> None:
    """One element's sign is all that is wrong, or what was not recorded is wrong as well."""
    right = "element 5 alone has the wrong sign; the others are right"
    assert _law(engine, _sign) == right
    assert _law(engine, _sign_and_end) == f"{_ALONE}{right}"
