"""Words for a wrong number: as a root, by the formula that it comes from, as the right one in a lower type."""

from math import log10

import numpy as np

from .. import ops
from .base import Steps

_PART = (
    2e-5  # of a number that its fewest digits leave open: the root of the limit that records are reproduced to, 1e-10, twice
)
_BITS = {"BF16": 8, "F16": 11}  # of the mantissa, the leading one included


def near_scale(value: float, wanted: float, right: Steps) -> list[str]:
    """The formula, with a size that other engines use by mistake, whose attention scale is close to a fitted one; nothing if there is
    none."""
    heads = next((int(step.params["heads"]) for step in right.values() if step.op is ops.attention_scores), 1)
    others = {
        1.0: "no scale",
        wanted**2: "the scale applied twice",
        1 / wanted: "its inverse",
        wanted * heads**-0.5: "by the width of all heads",
        wanted * 2**0.5: "by half the head size",
        wanted * 0.5**0.5: "by twice the head size",
    }
    near = min(others, key=lambda other: abs(log10(other) - log10(value)))
    return [f"it is {others[near]}"] if abs(value - near) < 1e-3 * near else []


def number_in_words(value: float, parameter: str) -> str:
    """A number as text; an attention scale also as one over a root."""
    if parameter != "scale":
        return f"{float(np.float32(value)):g}"
    return f"{value:.4g}{as_root(value)}"


def as_root(value: float) -> str:
    """ " = 1/√n" if a number is one over the root of a whole n, else ""."""
    n = value**-2 if value > 0 else 0.0
    return f" = 1/√{round(n)}" if n >= 1 and abs(n - round(n)) < 1e-3 * n else ""


def type_of_constant(value: float, wanted: float) -> str:
    """The type, BF16 or F16, that gives this number for the right one if it is kept in it; "" if none does, or if that changes nothing."""
    if wanted == 0 or not np.isfinite(wanted) or abs(value - wanted) <= _PART * abs(wanted):
        return ""
    fraction, power = np.frexp(wanted)
    for name, bits in _BITS.items():
        rounded = float(np.ldexp(np.rint(fraction * 2**bits), int(power) - bits))
        if abs(value - rounded) <= _PART * abs(wanted):
            return name
    return ""
