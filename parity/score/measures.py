"""What one prediction says: figures of single rows of logits, float64 accumulation, natural logarithms."""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from checkpoints.answers.score import PERCENTILES

TOP = 5
LEAST = 1e-9  # probability that a printed list leaves to all other tokens, at the least: its numbers add up to 1 up to rounding

Row = NDArray[np.float32]


def log_sum(logits: Row) -> float:
    """log Σ exp(x) of a row [V], float64; not finite if the row has NaN or ∞, or nothing but −∞."""
    largest = float(logits.max())
    if not np.isfinite(largest):
        return largest
    return largest + float(np.log(np.exp(logits.astype(np.float64) - largest).sum()))


def kl_whole(base: Row, ours: Row) -> float:
    """KL(base ‖ ours) of two rows [V], as llama-perplexity's --kl-divergence defines it: Σ p (log p − log q)."""
    p = base.astype(np.float64) - log_sum(base)
    q = ours.astype(np.float64) - log_sum(ours)
    likely = p > -np.inf  # what has no probability adds nothing, whatever the other side says
    return max(float(np.sum(np.exp(p[likely]) * (p[likely] - q[likely]))), 0.0)


class Listed(Struct, frozen=True):
    """A prediction of which only the most probable tokens are known: ids int64 [K], natural logarithms float64 [K], largest first.

    `own`: the text's own next token and its logarithm, where that is known besides.
    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    own: tuple[int, float] | None = None

    def logprob(self, token: int) -> float | None:
        """The log-probability of a token; None if it is not known."""
        if self.own is not None and self.own[0] == token:
            return self.own[1]
        places = np.flatnonzero(self.ids == token)
        return float(self.logprobs[places[0]]) if len(places) else None

    @property
    def most_of_others(self) -> float:
        """The largest log-probability that a token outside the list can have."""
        left = max(1.0 - float(np.exp(self.logprobs).sum()), LEAST)
        return min(float(self.logprobs.min()), float(np.log(left)))


def kl_of_shared(p: NDArray[np.float64], q: NDArray[np.float64], least: float = 1e-300) -> tuple[float, float]:
    """KL(p ‖ q) where only some tokens' log-probabilities [K] are known on both sides, and the probability that p has outside them.

    All others count as one entry: a lower bound, by the log-sum inequality, which misses only how they are spread among themselves.
    `least`: of what the lists leave to the others, as far as printed numbers tell; less counts as nothing.
    """
    left = max(1.0 - float(np.exp(p).sum()), 0.0)
    other_left = max(1.0 - float(np.exp(q).sum()), least)
    rest = left * (np.log(left) - np.log(other_left)) if left > least else 0.0
    likely = p > -np.inf
    return max(float(np.sum(np.exp(p[likely]) * (p[likely] - q[likely]))) + float(rest), 0.0), left


def kl_of_list(base: Listed, ours: Row) -> tuple[float, float]:
    """`kl_of_shared` of a base of which the most probable tokens are known, and a whole row [V]."""
    return kl_of_shared(base.logprobs, ours[base.ids].astype(np.float64) - log_sum(ours))


def kl_of_top(ids: NDArray[np.int64], logits: Row, base_log_sum: float, ours: Row) -> tuple[float, float]:
    """The same of a base's largest logits [K] and the logarithm of the sum of all."""
    return kl_of_list(Listed(ids, logits.astype(np.float64) - base_log_sum), ours)


def kl_of_lists(base: Listed, ours: Listed) -> tuple[float, float]:
    """`kl_of_shared` of the tokens that both list."""
    _, here, there = np.intersect1d(base.ids, ours.ids, assume_unique=True, return_indices=True)
    return kl_of_shared(base.logprobs[here], ours.logprobs[there], LEAST)


def largest(logits: Row, count: int) -> NDArray[np.int64]:
    """Ids of the largest logits, largest first; of equal ones the smaller id first."""
    count = min(count, len(logits))
    near = np.argpartition(-logits, count - 1)[:count]
    return near[np.lexsort((near, -logits[near]))].astype(np.int64)


class Tally(Struct):
    """Sums over positions, and every KL as one float64: 8 bytes per position, whatever the vocabulary."""

    count: int = 0
    nll: float = 0.0
    nll_squares: float = 0.0
    base_nll: float = 0.0
    same_top: int = 0
    top_shared: float = 0.0
    listed: int = 0  # positions at which both sides' first TOP tokens are known
    delta: float = 0.0
    delta_squares: float = 0.0
    bounded: int = 0  # positions at which the side's probability of the text's own token is only bounded
    unseen: float = 0.0
    most_unseen: float = 0.0
    kl: list[float] = field(default_factory=list)

    def predicted(self, log_p: float, *, bounded: bool = False) -> None:
        """The side's log-probability of the text's own next token; `bounded`: the most that it can be."""
        self.count += 1
        self.bounded += bounded
        self.nll -= log_p
        self.nll_squares += log_p * log_p

    def against(self, kl: float, unseen: float, base_log_p: float, ours: Sequence[int], base: Sequence[int]) -> None:
        """The same position beside the base; `ours` and `base` are the largest ids of each, `unseen` as `kl_of_shared` gives it."""
        self.kl.append(kl)
        self.unseen += unseen
        self.most_unseen = max(self.most_unseen, unseen)
        self.base_nll -= base_log_p
        self.same_top += int(ours[0] == base[0])
        if min(len(ours), len(base)) >= TOP:
            self.listed += 1
            self.top_shared += len(set(ours[:TOP]) & set(base[:TOP])) / TOP

    def moved(self, log_p: float, base_log_p: float) -> None:
        """How far the probability of the text's own token is from the base's."""
        delta = float(np.exp(log_p) - np.exp(base_log_p))
        self.delta += delta
        self.delta_squares += delta * delta

    @property
    def perplexity(self) -> tuple[float, float]:
        """exp(mean negative log-likelihood), and one standard deviation of it."""
        mean = self.nll / self.count
        variance = max(self.nll_squares / self.count - mean * mean, 0.0)
        with np.errstate(over="ignore"):
            value = float(np.exp(mean))
        return value, value * float(np.sqrt(variance / max(self.count - 1, 1)))

    def compared(self) -> dict[str, object]:
        """All figures on the distance from the base; none if there was no base."""
        if not self.kl:
            return {}
        kl, count = np.array(self.kl), self.count
        known = count - self.bounded
        with np.errstate(invalid="ignore", over="ignore"):  # a KL may be infinite
            spread, base = float(kl.std()), float(np.exp(self.base_nll / count))
            percentiles = {
                of: float(np.percentile(kl, of, method="lower" if np.isinf(kl).any() else "linear")) for of in PERCENTILES
            }
        return {
            "base_perplexity": base,
            "kl_mean": float(kl.mean()),
            "kl_error": spread / float(np.sqrt(max(count - 1, 1))),
            "kl_max": float(kl.max()),
            "kl_percentiles": percentiles,
            "same_top": self.same_top / count,
            "top_k": self.top_shared / self.listed if self.listed else None,
            "delta_p_mean": self.delta / known if known else None,
            "delta_p_rms": float(np.sqrt(self.delta_squares / known)) if known else None,
            "unseen": self.most_unseen,
            "unseen_mean": self.unseen / count,
        }
