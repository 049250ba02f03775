"""Whether a difference is that of lower arithmetic only: the right engine, rounded, is the measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from checkpoints.points import parse
from engine.graph import Step
from engine.replay.precision import ROUNDINGS, rounded
from engine.replay.replay import Replay

from .records import Expected, Floats, Ints

KINDS = tuple(ROUNDINGS)
# How far a right engine's error may lie from the one that our own rounding makes, which sits at other places of the
# computation. Measured over a hundred random models and prompts in seven arithmetics (`benchmarks/explain_precision.py floors`):
# a point's mean lay between 0.09 times the floor of rounded products and 3.8 times that of rounded activations (both with sums
# in F16, which our rounding does not copy), its largest single record at 19 times the latter at most.
UPPER, LOWER = 30.0, 1 / 300.0
_LARGE = 0.5  # NMSE: half of the signal is no rounding of any of these types
SINGLE = 30.0  # a single record against its point's mean


@dataclass(frozen=True)
class PrecisionFloor:
    """Mean NMSE of each point that one arithmetic costs: with products rounded, and with every activation rounded."""

    kind: str
    products: Floats
    storage: Floats


def may_be_noise(entries: Sequence[Expected]) -> bool:
    """Whether the differences look like noise at all: none is large, and from the first point on no record is spared."""
    first = next((number for number, entry in enumerate(entries) if (entry.base > entry.limit).any()), None)
    if first is None:
        return True
    if any(parse(entry.point).layer is not None for entry in entries[:first]):
        return False  # a layer agrees to the end of float32: this is no lower type
    spared = any((entry.base == 0).any() and not entry.quantum.any() for entry in entries[first:])
    return not spared and all(float(entry.base.max()) < _LARGE for entry in entries)


def floor(
    kind: str,
    entries: Sequence[Expected],
    steps: Sequence[Step],
    right: Replay,
    make: Callable[[Sequence[Step], int], Replay],
    positions: Ints,
) -> PrecisionFloor:
    """Measure what an arithmetic costs at each point of the dump."""
    means = []
    for storage in (False, True):
        other = make(rounded(steps, kind, storage=storage), len(positions))
        means.append(
            np.array([entry.between(other.on_host[entry.point], right.on_host[entry.point], positions) for entry in entries])
        )
    return PrecisionFloor(kind, means[0], np.maximum(*means))


def ratios(found: PrecisionFloor, entries: Sequence[Expected]) -> list[tuple[float, float, float]]:
    """How far each point lies from the floor: its mean error by that of rounded products, the same by that of rounded
    activations, its largest single error by the latter. NaN where that floor is below float32's own noise.
    """
    made = []
    for entry, products, storage in zip(entries, found.products, found.storage, strict=True):
        noise, mean = float(entry.limit.max()), float(entry.base.mean())
        lower = mean / products if products > noise else float("nan")
        upper = storage if storage > noise else float("nan")
        made.append((lower, mean / upper, float(entry.base.max()) / upper))
    return made


def fits(found: PrecisionFloor, entries: Sequence[Expected]) -> float | None:
    """How well a dump's differences are this arithmetic's: |log| of the typical ratio, None if they are not.

    Every point must lie between the floor of rounded products and that of rounded activations, give or take the factors
    above, and no record may stand out.
    """
    ratios = []
    for number, entry in enumerate(entries):
        mean = float(entry.base.mean())
        if not np.isfinite(mean) or mean > UPPER * max(found.storage[number], entry.limit.max() / UPPER):
            return None
        if entry.base.max() > SINGLE * UPPER * max(found.storage[number], entry.limit.max()):
            return None
        if found.products[number] > entry.limit.max():
            if mean < LOWER * found.products[number]:
                return None
            ratios.append(np.log(mean / np.sqrt(found.products[number] * found.storage[number])))
    return abs(float(np.median(ratios))) if ratios else None


def with_noise(found: PrecisionFloor, entries: Sequence[Expected]) -> list[Expected]:
    """The records with limits that this arithmetic does not exceed."""
    return [
        replace(entry, limit=np.maximum(entry.limit, UPPER * found.storage[number])) for number, entry in enumerate(entries)
    ]
