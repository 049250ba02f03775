"""An engine whose cache keeps keys and values in FP8: for tests and benchmarks."""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from engine.backend import Array
from engine.graph import Step
from engine.replay.kept import reads_cache
from engine.replay.precision import each


def eight_bit_floats(x: Array) -> Array:
    """Values of FP8 (E4M3, 448 at most) and back, by one scale for all of them."""
    largest = np.abs(x).max(initial=0.0)
    if not largest:
        return x
    scaled = x.astype(np.float64) * (448.0 / largest)
    step = np.exp2(np.maximum(np.frexp(scaled)[1] - 1, -6) - 3)
    return (np.rint(scaled / step) * step * (largest / 448.0)).astype(np.float32)


def eight_bit_cache(steps: Sequence[Step]) -> list[Step]:
    """Steps that read keys and values from a cache of FP8."""

    def keeping(step: Step) -> Step:
        places = {place for place, read in enumerate(step.reads) if reads_cache(read)}
        if not places:
            return step
        return replace(
            step,
            op=lambda *inputs, op=step.op, **params: op(
                *(each(eight_bit_floats, x) if place in places else x for place, x in enumerate(inputs)), **params
            ),
        )

    return [keeping(step) for step in steps]
