"""A cache in FP8, which nothing states, is no wrong operation where the model is known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, unstated
from msgspec.structs import replace
from planted import Faulty

from engine.graph import Step
from engine.replay.kept import reads_cache
from parity.diff.compare import Options
from parity.explain.on_model import compared_on


def three_bits(x: np.ndarray) -> np.ndarray:
    """Values with three bits of mantissa after the first, as FP8 (E4M3) has."""
    mantissa, exponent = np.frexp(x)
    return np.asarray(np.ldexp(np.rint(mantissa * 16) / 16, exponent), np.float32)


def keeping(steps: Sequence[Step], factor: float) -> list[Step]:
    """The steps of an engine whose cache keeps such values, times a factor."""

    def by(step: Step) -> Step:
        places = {place for place, read in enumerate(step.reads) if reads_cache(read)}

        def op(*inputs: Any, **params: Any) -> Any:
            kept = [three_bits(x * np.float32(factor)) if place in places else x for place, x in enumerate(inputs)]
            return step.op(*kept, **params)

        return replace(step, op=op) if places else step

    return [by(step) for step in steps]


@pytest.mark.parametrize("size", [16, 1 << 20])
@pytest.mark.parametrize(("factor", "open_"), [(1.0, True), (1.1, False)])
def test_a_cache_in_fp8_blames_no_operation(engine: Faulty, factor: float, size: int, *, open_: bool) -> None:
    """What was read from it differs by noise of that size at every position, which diff leaves open with the model as without; 1.1 times as
    large it is a fault.
    """
    steps = keeping(engine.right, factor)
    ours, right = (engine.dump(RIGHT, PROMPT, points="*", size=size, bare=False, steps=of) for of in (steps, engine.right))
    ours = unstated(ours)
    assert ours.header is not None
    ours = replace(ours, header=replace(ours.header, kv_type=""))
    verdict = compared_on(ours, right, Options(), engine.model).verdict
    assert not verdict
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.0.k_read"
    assert verdict.pattern is not None
    assert ("cache of lower type" in verdict.pattern.sentence) == open_
    assert bool(verdict.operation) != open_
