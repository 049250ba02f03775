"""`parity explain` calls the others right beside single wrong elements only where no sketch shows that the rest of the row differs."""

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

_ALONE = "in the 16 recorded of 112 elements (the rest of the row differs as well, as its sketch shows) "


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2."""
    return small_engine(tmp_path_factory.mktemp("rest-of-row"))


def _law(engine: Faulty, change: Callable[[Array], None]) -> str:
    """The law of an engine that changes its first norm's values, of which sixteen are recorded."""

    def changed(own: Callable[..., Array], *inputs: Any, **params: Any) -> Array:
        value = own(*inputs, **params).copy()
        change(value)
        return value

    steps = [replace(step, op=partial(changed, step.op)) if step.makes == "blk.0.attn_norm" else step for step in engine.right]
    dump = engine.dump(RIGHT, PROMPT, points="*", steps=steps, bare=False)
    return explain(dump, engine.model, replace(PATIENT, tokens=PROMPT)).law


def _sign(value: Array) -> None:
    value[:, 5] *= np.float32(-1)


def _sign_and_end(value: Array) -> None:
    _sign(value)
    value[:, 100:] = 0


def test_the_others_are_right_where_the_sketch_says_so(engine: Faulty) -> None:
    """One element's sign is all that is wrong, or what was not recorded is wrong as well."""
    right = "element 5 alone has the wrong sign; the others are right"
    assert _law(engine, _sign) == right
    assert _law(engine, _sign_and_end) == f"{_ALONE}{right}"
