"""Texts that are nested too deeply for their parser."""

import gc
import json
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from checkpoints.nesting import NestedTooDeeply, parsed

CALLS = 30  # of a finaliser in itself


class Finalised:
    """Garbage that only the collector finds, and whose finaliser calls functions."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        called(CALLS)


def called(times: int) -> None:
    if times:
        called(times - 1)


@pytest.mark.parametrize(("parse", "text"), [(json.loads, "[" * 100_000), (tomllib.loads, f"a = {'[' * 3000}")])
def test_no_finaliser_runs_close_to_the_limit_of_recursion(parse: Callable[[str], Any], text: str) -> None:
    """Wherever in such a text the collector would run, it does so afterwards: what a finaliser cannot finish fails a test."""
    before = gc.get_threshold()
    gc.freeze()  # the collector looks at what is made from here on, which is little
    try:
        for later in range(300, 1000, CALLS // 3):
            gc.collect()
            Finalised()
            gc.set_threshold(gc.get_count()[0] + later, *before[1:])
            with pytest.raises(NestedTooDeeply, match="it is nested too deeply"):
                parsed(parse, text)
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off() -> None:
    """Who turned it off does not find it on after a text was parsed."""
    gc.disable()
    try:
        assert parsed(json.loads, b'{"a": [1, NaN]}')["a"][0] == 1
        assert not gc.isenabled()
    finally:
        gc.enable()
