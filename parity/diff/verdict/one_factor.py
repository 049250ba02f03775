"""One factor or one summand in errors that lower arithmetic makes: rounding is scattered, and has no part that all positions share.

An arithmetic's limit is as wide as its noise, and a wrong factor of 1.002 is below it. But the part of the errors that is along the values
is known far more precisely than any single value: to the noise divided by the root of the number of elements.
"""

from math import inf

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Standard errors by which every position must be off to the same side. Of right engines in F16, TF32 and BF16 (16 models, 7,000 points) the
# nearest position of a point was off by 2.7 at most, with 8-bit activations by 3.9: twice the latter, in round numbers.
_STANDARD_ERRORS = 8.0
# The chance at which the positions' own parts, which rounding of one number of each row makes (an expert's weight), are so alike.
_CHANCE = 1e-4
# As in `scatter`: rounding of the n inputs of a product moves its results, however many, in n directions; small models have this width.
_DIRECTIONS = 64.0
_ELEMENTS, POSITIONS = 12, 3
# Elements that dwarf a row, which some channels of trained models do at every position, are one number, whose rounding all positions share:
# a sum in BF16 keeps 1000 where 1 is taken off it layer by layer. In a normal distribution one element in 1,300 is as far out.
_OUTLYING = 5.0
# Rounding to nearest moves a constant by half a step: a factor that an engine keeps in the type in which it computes (with 8-bit
# activations, in BF16 at the lowest). Two of them may meet.
STEP = {"f16": 2.0**-10, "tf32": 2.0**-10, "bf16": 2.0**-8, "q8": 2.0**-8}
# An engine that cuts digits off, where others round, makes values smaller: by 0.7 such steps each time on average, and eight times a layer
# at most (a norm, both factors of three products, a sum). With 8 bits it is half a step of 127.
_TIMES = 8
# The distance of neighbouring numbers of a type, in proportion to the smaller one, at its largest.
SPACING = {"f16": 2.0**-10, "tf32": 2.0**-10, "bf16": 2.0**-7}
# Cutting makes noise, too: the digits that are lost are a third of a spacing on average, weighted by the values' energy, and their variance
# is 0.043 of its square (numbers whose logarithms are spread evenly; as for rounding). Each further cut adds as much to both, so that noise
# of variance v comes with a factor smaller by 7.75 v. Engines that cut everything or just factors of products (eight models, F16 and BF16,
# 18,000 points): 5.2 v at most, beside one and a half spacings for numbers that a whole row has in common (a norm's, a constant).
IN_COMMON, _OF_NOISE = 1.5, 7.75
# Where an engine rounds, one operation may cut digits off to a lower type still: a third of its spacing beside noise of 0.21 of it.
_CUT_ONCE = 1.6


class Allowed(Struct, frozen=True):
    """By which proportion right values may be too large or too small, apart from noise.

    `spacing`: of the type's numbers, if digits that are cut off may make values smaller: then by no more than their noise allows.
    `rounded`: by how much they may be smaller if the engine is known to round to nearest.
    """

    above: float = 0.0
    below: float = 0.0
    spacing: float = 0.0
    rounded: float = inf

    @classmethod
    def of(cls, kind: str, layers: int) -> "Allowed":
        """What an arithmetic allows after this many layers."""
        return cls(STEP[kind], _TIMES * layers * STEP[kind], SPACING.get(kind, 0.0))

    def smaller(self, noise: Floats) -> Floats:
        """By how much rows beside noise of some variance, [R], may be smaller."""
        if not self.spacing:
            return np.full(len(noise), self.below)
        rounded = np.maximum(self.rounded, _CUT_ONCE * np.sqrt(noise))
        return np.minimum(np.minimum(self.below, rounded), IN_COMMON * self.spacing + _OF_NOISE * noise / self.spacing)


NOTHING = Allowed()


class Part(Struct, frozen=True):
    """What all positions share: `factor` of the right values or, of a `summand`, 0.

    `error` is the standard error of either; `beyond` how many times what is allowed to noise the nearest position is off.
    """

    factor: float
    summand: float
    error: float
    beyond: float

    @property
    def words(self) -> str:
        """The part as words."""
        if self.factor:
            digits = min(6, max(0, 1 - int(np.floor(np.log10(self.error)))))
            return f"{self.factor:.{digits}f} (± {self.error:.1g}) times the right values"
        return f"the right values plus {self.summand:.2g} (± {self.error:.1g})"


class Trend(Struct, frozen=True):
    """The mean part of errors along the right values, its standard error, and the variance of the rest, all as parts of the values."""

    part: float
    error: float
    noise: float


def trend_of(errors: Floats, right: Floats) -> Trend | None:
    """The trend of errors [R, k] of right values, [R, k]; None if fewer than `POSITIONS` rows show one."""
    errors, right = _showing(errors, right)
    wrong = (errors != 0).any(axis=1)
    errors, right = errors[wrong], right[wrong]
    if len(errors) < POSITIONS:
        return None
    parts, left, energy = _along(errors, right)
    spread = max(float(_noise(left, right, energy).mean()), float(parts.var()))
    return Trend(float(parts.mean()), float(np.sqrt(spread / len(parts))), float(np.median((left * left).sum(axis=1) / energy)))


def shared_factor(errors: Floats, right: Floats, allowed: Allowed = NOTHING, *, fewest: int = POSITIONS) -> Part | None:
    """The factor that errors [R, k] of right values, or of projections of whole rows, [R, k], share beside their noise; None without one.

    Args:
        allowed: how far a right factor may be off.
        fewest: rows that suffice: of fewer than `POSITIONS` one may be off by the rounding of a number of its own.
    """
    errors, some = _showing(errors, right)
    _, left, energy = _along(errors, some)
    below = allowed.smaller((left * left).sum(axis=1) / energy)
    along = _shared(errors, some, some, np.full(len(some), allowed.above), below, fewest)
    return None if along is None else Part(1 + along[0], 0.0, *along[1:])


def beside_cut_digits(errors: Floats, right: Floats, kind: str) -> Floats | None:
    """Errors [R, k] without the part of right values [R, k] by which all are smaller, if digits cut off in an arithmetic can make it.

    None where a row is larger, or smaller than its noise allows, or all 0.
    """
    if kind not in SPACING or not len(right) or not right.any(axis=1).all():
        return None
    parts, left, energy = _along(errors, right)
    most = Allowed(below=inf, spacing=SPACING[kind]).smaller((left * left).sum(axis=1) / energy)
    return left if bool(((parts <= 0) & (-parts <= most)).all()) else None


def shared_summand(errors: Floats, right: Floats, allowed: Allowed = NOTHING) -> Part | None:
    """The summand that errors [R, k] of right values [R, k] share beside their noise; None without one.

    Args:
        allowed: how far a right factor may be off: what it makes of values that have a mean is no summand.
    """
    if right.shape[1] < _ELEMENTS:
        return None
    energy = np.maximum((right * right).sum(axis=1), np.finfo(np.float64).tiny)
    factors = np.clip((errors * right).sum(axis=1) / energy, -allowed.below, allowed.above)
    # Values that are all alike are rounded alike.
    alike = allowed.above * np.abs(right.mean(axis=1))
    along = _shared(errors - factors[:, None] * right, right, np.ones_like(right), alike, alike, POSITIONS)
    return None if along is None else Part(0.0, *along)


def _showing(errors: Floats, right: Floats) -> tuple[Floats, Floats]:
    """The errors and right values, [R, k] both, of rows with enough values that show a factor; 0 where a value dwarfs its row."""
    usual = _usual(right)
    shows = np.count_nonzero(usual & (right != 0), axis=1) >= _ELEMENTS
    return np.where(usual, errors, 0.0)[shows], np.where(usual, right, 0.0)[shows]


def _along(errors: Floats, direction: Floats) -> tuple[Floats, Floats, Floats]:
    """The coefficients of errors [R, k] along directions [R, k], what is left of them, and the directions' energy."""
    energy = (direction * direction).sum(axis=1)
    parts = (errors * direction).sum(axis=1) / energy
    return parts, errors - parts[:, None] * direction, energy


def _noise(left: Floats, direction: Floats, energy: Floats) -> Floats:
    """The variance of a coefficient along a direction that noise [R, k] makes: [R]."""
    along = (left * left * direction * direction).sum(axis=1) / energy
    return np.asarray(np.maximum(along, (left * left).sum(axis=1) / _DIRECTIONS) / energy)


def _usual(right: Floats) -> NDArray[np.bool_]:
    """Which values [R, k] do not dwarf their row: its median is that of the values that are not 0."""
    size = np.abs(right)
    width = size.shape[1]
    if not width:
        return np.zeros_like(size, dtype=bool)
    middle = np.minimum((np.count_nonzero(size == 0, axis=1) + width) // 2, width - 1)
    return np.asarray(size <= _OUTLYING * np.take_along_axis(np.sort(size, axis=1), middle[:, None], axis=1))


def _shared(
    errors: Floats, right: Floats, direction: Floats, above: Floats, below: Floats, fewest: int
) -> tuple[float, float, float] | None:
    """The coefficient of errors [R, k] along a direction [R, k] that all rows share, its standard error, and `Part.beyond`; None if they
    share none. `above` and `below`, [R], are what is allowed of it."""
    wrong = (errors != 0).any(axis=1) & (right != 0).any(axis=1)
    errors, direction, above, below = (of[wrong] for of in (errors, direction, above, below))
    if len(errors) < fewest:
        return None
    parts, left, energy = _along(errors, direction)
    noise = _noise(left, direction, energy)
    off = np.where(parts > 0, parts - above, -parts - below)
    alike = (parts > 0).all() or (parts < 0).all()
    # Noise turns a row, and one as long as before is then shorter along the right one by half the square of that.
    turned = 0.5 * (left * left).sum(axis=1) / energy
    with np.errstate(divide="ignore"):
        beyond = float(((off - turned) / (_STANDARD_ERRORS * np.sqrt(noise))).min())
    if not alike or not beyond > 1:
        return None
    different = 1 - float(parts.sum()) ** 2 / (len(parts) * float((parts * parts).sum()))
    if len(parts) > 1 and different > _CHANCE ** (2 / (len(parts) - 1)):
        return None
    return float(parts.mean()), max(float(np.sqrt(noise.mean())), float(np.finfo(np.float32).eps)), beyond
