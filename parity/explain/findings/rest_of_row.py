"""Whether what was not recorded of a row is right where single recorded elements are wrong, which a sketch shows."""

import numpy as np

from ...laws.beside import ROOM, Beside, Ints
from ..records.records import Expected

_SINGLE, _OTHERS = "element", "; the others are right"


def with_rest(entry: Expected, wrong: Ints, compared: Beside | None, sentence: str, positions: Ints) -> str:
    """The law of an entry's wrong records, or that it is of their recorded elements alone, where it calls the others right and the sketches
    contradict that.
    """
    if compared is None or compared.whole is None or entry.pair.ours.sketch is None or not np.isfinite(compared.dumped).all():
        return sentence
    count, of = compared.dumped.shape[1], compared.whole.shape[1]
    if count == of or not (sentence.startswith(_SINGLE) and sentence.endswith(_OTHERS)):
        return sentence
    tensor = compared.whole.astype(np.float32)
    tensor[np.ix_(compared.rows, compared.index)] = compared.dumped
    if (entry.nmse(tensor, positions)[wrong] <= ROOM * entry.limit[wrong]).all():
        return sentence
    return f"in the {count} recorded of {of} elements (the rest of the row differs as well, as its sketch shows) {sentence}"
