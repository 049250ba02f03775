"""The error function of arrays, which NumPy lacks."""

import math
from functools import lru_cache

import numpy as np

from ..backend import Array

_DEGREE = 24  # of the polynomial; its error is below the rounding of its evaluation
_LARGEST = 6.0  # erf is 1 in float64 from here on


def erf(x: Array) -> Array:
    """erf(x) in float64, within 5e-15 of math.erf.

    erfc(z)·exp(z²) is smooth in z / (z + 3.75) and is interpolated there by Chebyshev polynomials (M. M. Shepherd and
    J. G. Laframboise, Math. Comp. 36, 1981); the coefficients are computed from math.erfc.
    """
    wide = x.astype(np.float64)
    z = np.minimum(np.abs(wide), _LARGEST)
    t = 2 * _place(z) - 1
    first, *rest = _coefficients()
    later = earlier = np.zeros_like(t)
    for coefficient in reversed(rest):  # Clenshaw's recurrence
        later, earlier = 2 * t * later - earlier + coefficient, later
    return np.copysign(1.0 - (t * later - earlier + first) * np.exp(-z * z), wide)


def _place(z: Array) -> Array:
    """0 … _LARGEST mapped to 0 … 1."""
    return z / (z + 3.75) * ((_LARGEST + 3.75) / _LARGEST)


@lru_cache(maxsize=1)
def _coefficients() -> tuple[float, ...]:
    """The coefficients of the interpolation, in as many Chebyshev points as there are coefficients."""
    angles = (np.arange(_DEGREE + 1) + 0.5) * (math.pi / (_DEGREE + 1))
    share = (np.cos(angles) + 1) / 2 * (_LARGEST / (_LARGEST + 3.75))
    scaled = np.array([math.erfc(z) * math.exp(z * z) for z in 3.75 * share / (1 - share)])
    first, *rest = (float(np.mean(scaled * np.cos(order * angles))) for order in range(_DEGREE + 1))
    return (first, *(2 * coefficient for coefficient in rest))
