"""llama.cpp's own predictions at the positions that a server was asked about, and how far llama.cpp differs from itself there."""

from collections.abc import Iterator, Sequence
from math import exp
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from reference.client import Reference
from reference.jobs import EXACT, NATIVE

from ..score.measures import LEAST, Listed, kl_of_shared, kl_of_top, largest, log_sum
from .predictions import TokenCandidate
from .vocabulary import Vocabulary

Row = NDArray[np.float32]  # logits [V]
_KEPT = 256  # largest logits of a row that are kept to compare two passes
_PORTION = 16
_LARGEST = 40.0  # of what is no logarithm of a probability: its exponential is a number still
_ROUNDED = 1e-5  # how far over 1 probabilities sum by the digits with which servers print them
NOTHING = -69.0  # log(1e-30): what a server calls impossible


class KlFloor(Struct, frozen=True):
    """KL of two passes of llama.cpp over the same tokens, float32 and the file's own types with an F16 cache: worst and mean."""

    worst: float
    mean: float


def rows(
    reference: Reference, model: Path, tokens: Sequence[int], first: int, mode: str, kv_type: str = "f32"
) -> Iterator[tuple[int, Row]]:
    """(position, logits [V]) from `first` on."""
    position = first
    for part in reference.logits(model, tokens, first=first, portion=_PORTION, mode=mode, kv_type=kv_type):
        for row in part:
            yield position, row
            position += 1


def floor_of(reference: Reference, model: Path, tokens: Sequence[int], first: int) -> KlFloor:
    """How far llama.cpp differs from itself on these tokens, between float32 and the way a server computes the file."""
    kept = []
    for _, row in rows(reference, model, tokens, first, NATIVE, "f16"):
        top = largest(row, _KEPT)
        kept.append((top, row[top], log_sum(row)))
    distances = []
    for (_, row), (top, logits, total) in zip(rows(reference, model, tokens, first, EXACT), kept, strict=True):
        distances.append(kl_of_top(top, logits, total, row)[0])
    return KlFloor(max(distances), float(np.mean(distances)))


def listed(candidates: Sequence[TokenCandidate], vocabulary: Vocabulary, row: Row) -> Listed:
    """The candidates whose token is known; if several tokens have the same text, the one most probable to llama.cpp."""
    known: dict[int, float] = {}
    for candidate in candidates:
        number = vocabulary.most_probable(candidate, lambda number: float(row[number]))
        if number is not None and number not in known:
            known[number] = max(candidate.logprob, NOTHING)
    return Listed(np.array(list(known), dtype=np.int64), np.array(list(known.values())))


def kl(row: Row, server: Listed) -> float:
    """KL(llama.cpp ‖ server) over the server's candidates, all other tokens together as one more: a lower bound of the whole."""
    if not len(server.ids):
        return 0.0
    within = kl_of_shared(log_probabilities(row, server.ids), server.logprobs, LEAST)[0]
    # Of probabilities that sum to more than 1 the generalised divergence: what they sum to beyond 1 counts, too.
    return within + max(float(np.exp(np.minimum(server.logprobs, _LARGEST)).sum()) - 1.0 - _ROUNDED, 0.0)


def log_probabilities(row: Row, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """llama.cpp's natural log-probabilities of these tokens."""
    return np.asarray(row[ids].astype(np.float64) - log_sum(row))


def probability(row: Row, number: int) -> float:
    """llama.cpp's probability of a token."""
    return exp(float(row[number]) - log_sum(row))
