"""What a server may give instead of natural log-probabilities: another base or sign, probabilities, logits."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import log

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_ADVICE = "Let the server give natural log-probabilities: log_softmax of the logits."
_LEAST = 1e-30  # a probability of 0, of which the logarithm is still a number
_ROUNDED = 1e-6  # what rounding makes of a probability of 0, or of 1 by its logarithm
_OF_LOGITS = 1.0  # how far logits as a whole may lie from llama.cpp's: softmax does not see it, and quantised weights move them
_TELLING = 1e-3  # probability of all candidates of a position: the first five of the flattest prediction have more
_SURE = 0.05  # a log-probability nearer to 0 tells no factor: it is mostly rounding
_NEAR = 0.02  # how far a fitted factor may be from a base's


class Meaning(Struct, frozen=True):
    """One reading of a server's numbers: `natural` makes log-probabilities of a position's [K], given llama.cpp's of the same tokens."""

    name: str
    sentence: str
    natural: Callable[[Numbers, Numbers], Numbers]


def meanings(reported: Sequence[Numbers], ours: Sequence[Numbers], sums: Sequence[float]) -> Iterator[Meaning]:
    """Readings to be tried.

    `reported` are the server's numbers at each position, `ours` llama.cpp's log-probabilities of the same tokens, `sums` the logarithms
    of the sums of llama.cpp's exponentials.
    """
    least = min((float(their.min()) for their in reported if len(their)), default=0.0)
    if least > -_ROUNDED:  # of no negative number alone: the others would be impossible tokens, of which nothing is known
        yield Meaning(
            "log-sign", "the numbers are negative log-probabilities: their sign is wrong", lambda numbers, _: -numbers
        )
        yield Meaning(
            "probabilities",
            "the numbers are probabilities, not their logarithms",
            lambda numbers, _: np.log(np.maximum(numbers, _LEAST)),
        )
    off = [_offset(their, our) - log_sum for their, our, log_sum in zip(reported, ours, sums, strict=True) if len(their) > 1]
    if off and abs(float(np.median(off))) < _OF_LOGITS:
        sentence = "the numbers are logits: the logarithm of the sum of their exponentials is not subtracted"
        yield Meaning("logits", sentence, _moved)
    factor = _factor(reported, ours)
    if factor is None:
        return
    for base, of_base in ((10, 1 / log(10)), (2, 1 / log(2))):
        if abs(factor / of_base - 1) < _NEAR:
            sentence = f"the log-probabilities are to the base {base}: each is {of_base:.4f} times the natural logarithm"
            yield Meaning("log-base", sentence, partial(_divided, by=of_base))
            return
    if abs(factor - 1) > _NEAR and sum(map(len, reported)) > 1:  # a single number fits any factor
        sentence = f"each log-probability is {factor:.4g} times llama.cpp's, with no new normalisation"
        yield Meaning("log-scale", sentence, partial(_divided, by=factor))


def unnormalised(reported: Sequence[Numbers], ours: Sequence[Numbers]) -> Meaning | None:
    """The reading that every position's numbers are off by a constant of its own; None where single candidates cannot show it."""
    off = [_offset(their, our) for their, our in zip(reported, ours, strict=True) if len(their) > 1]
    if len(off) < len(reported):
        return None
    sentence = (
        "the log-probabilities of each position are llama.cpp's plus a constant: they are not normalised over the vocabulary "
        f"({min(off):+.3g} to {max(off):+.3g})"
    )
    return Meaning("not-normalised", sentence, _moved)


def tells(ours: Sequence[Numbers]) -> bool:
    """Whether llama.cpp thinks the server's candidates probable at all; of improbable ones alone any reading makes the divergence small."""
    return len(ours) > 0 and float(np.median([np.exp(our).sum() for our in ours])) > _TELLING


def _divided(numbers: Numbers, _: Numbers, *, by: float) -> Numbers:
    return numbers / by


def _moved(numbers: Numbers, ours: Numbers) -> Numbers:
    return numbers - _offset(numbers, ours)


def _offset(numbers: Numbers, ours: Numbers) -> float:
    """How far a position's numbers are above llama.cpp's: the mean by probability, since improbable tokens are off by more."""
    return float(np.average(numbers - ours, weights=np.exp(ours - ours.max()))) if len(numbers) else 0.0


def advice(meaning: Meaning) -> str:
    """What to do about it."""
    if meaning.name == "log-base":
        return "Use log, not log10 or log2, or multiply by the logarithm of the base."
    return _ADVICE


def _factor(reported: Sequence[Numbers], ours: Sequence[Numbers]) -> float | None:
    """The median ratio of the server's numbers to llama.cpp's; None if nothing tells it."""
    both = [(their, our) for their, our in zip(reported, ours, strict=True) if len(their)]
    if not both:
        return None
    their, our = (np.concatenate([pair[side] for pair in both]) for side in (0, 1))
    keep = np.isfinite(their) & (their > -30) & (our < -_SURE) & (our > -30)
    if not keep.any():
        return None
    factor = float(np.median(their[keep] / our[keep]))
    return factor if factor > 0 else None
