"""Whether an engine rounds or cuts digits off, by how much smaller its values are: at the points that others are made from."""

from collections.abc import Iterable
from math import inf

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..measured.dataflow import Flow
from ..measured.operations import MIXING
from .one_factor import IN_COMMON, Allowed, Floats, Trend, trend_of

# In numbers of the type's spacing. Products of engines that cut digits off were smaller by 0.21 at least, those of engines that round to
# nearest by 0.46 at most and by 0.13 in one of 20, where they were known this well (eight models, F16 and BF16, 1,300 points).
_ROUNDED, _WELL_KNOWN = 0.1, 0.06
# Noise below this is not that of the lower type: rounding one factor of a product makes 0.2 of a spacing.
_LOWER = 0.1
_STANDARD_ERRORS = 3.0
# A product of two values is smaller by the parts of both.
_FACTORS = 2.0


class _Known(Struct, frozen=True):
    """Of a point: by how much its values may be smaller, as a part of them; whether a product behind it is known to round to nearest."""

    smaller: float
    rounds: bool


class Cuts:
    """By how much values may be smaller at a point than at those that it is made from; `add` the points in dataflow order."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._known: dict[str, _Known] = {}
        self._layers: dict[str, int] = {}

    def narrowed(self, allowed: Allowed, name: str, layers: int) -> Allowed:
        """What is allowed at a point: not all that cutting digits off might make if a product behind it rounds to nearest.

        Single operations may cut them all the same, and pass that on.
        """
        self._layers[name] = layers
        above = [self._known[other] for other in self._flow.parents[name] if other in self._known]
        smaller, rounded = allowed.below, inf
        if allowed.spacing and any(known.rounds for known in above):
            crossed = max(1, layers - min(self._layers[other] for other in self._flow.parents[name] if other in self._known))
            rounded = _FACTORS * max(known.smaller for known in above) + crossed * IN_COMMON * allowed.spacing
            smaller = min(smaller, rounded)
        self._known[name] = _Known(smaller, any(known.rounds for known in above))
        return replace(allowed, rounded=rounded)

    def add(self, name: str, allowed: Allowed, views: Iterable[tuple[Floats, Floats]]) -> None:
        """What a point's errors, beside the right values, show: [R, k] both, of leading values and of projections."""
        trends = [trend for view in views if (trend := trend_of(*view)) is not None]
        if not trends or not allowed.spacing:
            return
        trend = min(trends, key=lambda trend: trend.error)
        self._known[name] = _Known(
            max(0.0, -trend.part) + _STANDARD_ERRORS * trend.error,
            self._known[name].rounds or (self._multiplied(name) and _rounds(trend, allowed.spacing)),
        )

    def _multiplied(self, name: str) -> bool:
        stretch = self._flow.between(name)
        return stretch is not None and bool(MIXING & self._flow.operations(stretch.nodes))


def _rounds(trend: Trend, spacing: float) -> bool:
    """Whether errors are noise of a lower type that makes values no smaller."""
    return bool(
        np.sqrt(trend.noise) >= _LOWER * spacing and trend.error <= _WELL_KNOWN * spacing and trend.part > -_ROUNDED * spacing
    )
