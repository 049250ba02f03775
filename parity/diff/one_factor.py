"""One factor or one summand in errors that lower arithmetic makes: rounding is scattered, and has no part that all positions share.

An arithmetic's limit is as wide as its noise, and a wrong factor of 1.002 is below it. But the part of the errors that is along the values
is known far more precisely than any single value: to the noise divided by the root of the number of elements.
"""

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
# Rounding to nearest moves a constant by half a step: a factor that an engine keeps in the type in which it computes. Two of them may meet.
STEP = {"f16": 2.0**-10, "tf32": 2.0**-10, "bf16": 2.0**-8, "q8": 0.0}
# An engine that cuts digits off, where others round, makes values smaller: by 0.7 such steps each time on average, and eight times a layer
# at most (a norm, both factors of three products, a sum). With 8 bits it is half a step of 127.
_CUT, _TIMES = {**STEP, "q8": 2.0**-8}, 8


class Allowed(Struct, frozen=True):
    """By how much right values may be larger, and smaller, as a part of them, without noise."""

    above: float = 0.0
    below: float = 0.0

    @classmethod
    def of(cls, kind: str, layers: int) -> "Allowed":
        """In an arithmetic, after so many layers."""
        return cls(STEP[kind], _TIMES * layers * _CUT[kind])


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


def shared_factor(errors: Floats, right: Floats, allowed: Allowed = NOTHING, *, fewest: int = POSITIONS) -> Part | None:
    """The factor that errors [R, k] of right values, or of projections of whole rows, [R, k], share beside their noise; None without one.

    Args:
        allowed: how far a right factor may be off.
        fewest: rows that suffice: of fewer than `POSITIONS` one may be off by the rounding of a number of its own.
    """
    along = _shared(errors, right, right, allowed, fewest)
    return None if along is None else Part(1 + along[0], 0.0, *along[1:])


def shared_summand(errors: Floats, right: Floats) -> Part | None:
    """The summand that errors [R, k] of right values [R, k] share beside their noise; None without one."""
    along = _shared(errors, right, np.ones_like(right), NOTHING, POSITIONS)
    return None if along is None else Part(0.0, *along)


def _shared(
    errors: Floats, right: Floats, direction: Floats, allowed: Allowed, fewest: int
) -> tuple[float, float, float] | None:
    """The coefficient of errors [R, k] along a direction [R, k] that all rows share, its standard error, and `Part.beyond`; None if they
    share none."""
    wrong = (errors != 0).any(axis=1) & (right != 0).any(axis=1)
    errors, direction = errors[wrong], direction[wrong]
    if len(errors) < fewest or errors.shape[1] < _ELEMENTS:
        return None
    energy = (direction * direction).sum(axis=1)
    parts = (errors * direction).sum(axis=1) / energy
    left = errors - parts[:, None] * direction
    noise = (
        np.maximum((left * left * direction * direction).sum(axis=1) / energy, (left * left).sum(axis=1) / _DIRECTIONS) / energy
    )
    off = np.where(parts > 0, parts - allowed.above, -parts - allowed.below)
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
