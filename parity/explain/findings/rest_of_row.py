"""Whether a law of the recorded elements holds for the rest of their rows as well, which a sketch shows."""

from collections.abc import Iterator

import numpy as np

from ...laws.beside import ROOM, Beside, Floats, Ints
from ...laws.laws import OF_A_WEIGHT
from ..records.records import Expected

_EVERY, _SINGLE, _OTHERS = "every element ", "element", "; the others are right"


def with_rest(entry: Expected, wrong: Ints, compared: Beside | None, sentence: str, positions: Ints) -> str:
    """The sentence on wrong records of an entry, or that it is of their recorded elements alone, if their sketches contradict it.

    Asked are laws of one number or of single elements: what others say of an element that was not recorded is not known.
    """
    if compared is None or compared.whole is None or entry.pair.ours.sketch is None:
        return sentence
    count, of = compared.dumped.shape[1], compared.whole.shape[1]
    if count == of or "recorded" in sentence or "bias" in sentence or sentence.endswith(OF_A_WEIGHT):
        return sentence
    if sentence.startswith(_EVERY):
        laws = _by_a_number(compared)
    elif sentence.startswith(_SINGLE) and sentence.endswith(_OTHERS) and np.isfinite(compared.dumped).all():
        laws = iter((_elsewhere_right(compared),))
    else:
        return sentence
    for rows in laws:
        tensor = compared.whole.copy()
        tensor[compared.rows] = rows
        errors = entry.nmse(tensor.astype(np.float32), positions)[wrong]
        if (errors <= ROOM * entry.limit[wrong]).all():
            return sentence
    return f"in the {count} recorded of {of} elements (the rest of the row does not follow, as its sketch shows) {sentence}"


def _by_a_number(compared: Beside) -> Iterator[Floats]:
    """The whole wrong rows [R, n] as the numbers make them that fit their recorded elements: a factor, a summand, or both."""
    assert compared.whole is not None
    whole, right, dumped = compared.whole[compared.rows], compared.right.ravel(), compared.dumped.ravel()
    one = np.ones_like(right)
    yield whole * np.linalg.lstsq(right[:, None], dumped, rcond=None)[0][0]
    yield whole + np.mean(dumped - right)
    factor, summand = np.linalg.lstsq(np.stack([right, one], axis=1), dumped, rcond=None)[0]
    yield whole * factor + summand


def _elsewhere_right(compared: Beside) -> Floats:
    """The whole wrong rows [R, n] if what was not recorded of them is right."""
    assert compared.whole is not None
    rows = compared.whole[compared.rows].copy()
    rows[:, compared.index] = compared.dumped
    return rows
