"""What a hunt found: the runs of an engine that led from the first divergence to an operation, and the cause."""

from dataclasses import dataclass, field

from .diff import Verdict
from .explain import Explanation


@dataclass(frozen=True)
class Round:
    """One run of the engine.

    Attributes:
        number: from 1.
        asked: the `--points` expression that was asked for.
        recorded: the points that were there for the first time.
        verdict: the comparison of everything recorded so far.
    """

    number: int
    asked: str
    recorded: tuple[str, ...]
    verdict: Verdict


@dataclass(frozen=True)
class Hunt:
    """All runs; true for parity.

    Attributes:
        explanation: None where nothing differs, or where it could not be looked for (`unexplained` says why).
        stopped: why it went no further, where the operation has no name yet.
    """

    rounds: tuple[Round, ...]
    explanation: Explanation | None = None
    unexplained: str = ""
    stopped: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def verdict(self) -> Verdict:
        """The comparison of everything that was recorded."""
        return self.rounds[-1].verdict

    def __bool__(self) -> bool:
        return bool(self.verdict)
