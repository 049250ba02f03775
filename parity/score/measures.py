"""What one prediction says: figures of single rows of logits, float64 accumulation, natural logarithms."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.score import PERCENTILES

TOP = 5

Row = NDArray[np.float32]


def log_sum(logits: Row) -> float:
    """log Σ exp(x) of a row [V], float64."""
    largest = float(logits.max())
    return largest + float(np.log(np.exp(logits.astype(np.float64) - largest).sum()))


def kl_whole(base: Row, ours: Row) -> float:
    """KL(base ‖ ours) of two rows [V], as llama-perplexity's --kl-divergence defines it: Σ p (log p − log q)."""
    p = base.astype(np.float64) - log_sum(base)
    q = ours.astype(np.float64) - log_sum(ours)
    return max(float(np.sum(np.exp(p) * (p - q))), 0.0)


def kl_of_top(ids: NDArray[np.int64], logits: Row, base_log_sum: float, ours: Row) -> tuple[float, float]:
    """KL(base ‖ ours) where only the base's largest logits [K] are known, and the probability that the others have together.

    All others count as one entry: a lower bound, by the log-sum inequality, which misses only how they are spread among themselves.
    """
    p = logits.astype(np.float64) - base_log_sum
    q = ours[ids].astype(np.float64) - log_sum(ours)
    known = float(np.sum(np.exp(p) * (p - q)))
    left = max(1.0 - float(np.exp(p).sum()), 0.0)
    ours_left = max(1.0 - float(np.exp(q).sum()), 1e-300)
    rest = left * (np.log(left) - np.log(ours_left)) if left > 0 else 0.0
    return max(known + float(rest), 0.0), left


def largest(logits: Row, count: int) -> NDArray[np.int64]:
    """Ids of the largest logits, largest first; of equal ones the smaller id first."""
    count = min(count, len(logits))
    near = np.argpartition(-logits, count - 1)[:count]
    return near[np.lexsort((near, -logits[near]))].astype(np.int64)


@dataclass
class Tally:
    """Sums over positions, and every KL as one float64: 8 bytes a position, whatever the vocabulary."""

    count: int = 0
    nll: float = 0.0
    nll_squares: float = 0.0
    base_nll: float = 0.0
    same_top: int = 0
    top_shared: float = 0.0
    delta: float = 0.0
    delta_squares: float = 0.0

    def __post_init__(self) -> None:
        self.kl: list[float] = []

    def predicted(self, log_p: float) -> None:
        """The side's log-probability of the text's own next token."""
        self.count += 1
        self.nll -= log_p
        self.nll_squares += log_p * log_p

    def against(self, kl: float, log_p: float, base_log_p: float, ours: NDArray[np.int64], base: NDArray[np.int64]) -> None:
        """The same position beside the base; `ours` and `base` are the largest ids of each."""
        self.kl.append(kl)
        self.base_nll -= base_log_p
        self.same_top += int(ours[0] == base[0])
        self.top_shared += len(set(ours[:TOP].tolist()) & set(base[:TOP].tolist())) / len(base[:TOP])
        delta = float(np.exp(log_p) - np.exp(base_log_p))
        self.delta += delta
        self.delta_squares += delta * delta

    @property
    def perplexity(self) -> tuple[float, float]:
        """exp(mean negative log-likelihood), and one standard deviation of it."""
        mean = self.nll / self.count
        variance = max(self.nll_squares / self.count - mean * mean, 0.0)
        value = float(np.exp(mean))
        return value, value * float(np.sqrt(variance / max(self.count - 1, 1)))

    def compared(self) -> dict[str, object]:
        """Everything about the distance from the base; nothing where there was none."""
        if not self.kl:
            return {}
        kl, count = np.array(self.kl), self.count
        return {
            "base_perplexity": float(np.exp(self.base_nll / count)),
            "kl_mean": float(kl.mean()),
            "kl_error": float(kl.std() / np.sqrt(max(count - 1, 1))),
            "kl_max": float(kl.max()),
            "kl_percentiles": {of: float(np.percentile(kl, of)) for of in PERCENTILES},
            "same_top": self.same_top / count,
            "top_k": self.top_shared / count,
            "delta_p_mean": self.delta / count,
            "delta_p_rms": float(np.sqrt(self.delta_squares / count)),
        }
