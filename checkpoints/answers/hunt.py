"""The result of a hunt: the runs of an engine that led from the first divergence to an operation, and the cause."""

from msgspec import Struct, field

from .diff import Verdict
from .explain import Explanation


class Round(Struct, frozen=True):
    """One run of the engine.

    Attributes:
        number: from 1.
        points: the `--points` expression that was requested.
        recorded: the points that were recorded for the first time.
        verdict: the comparison of everything recorded so far.
    """

    number: int
    points: str
    recorded: tuple[str, ...]
    verdict: Verdict


class Hunt(Struct, frozen=True):
    """All runs; true if the sides agree.

    Attributes:
        explanation: None if nothing differs, or if no cause could be searched for (`unexplained` says why).
        own_tokens: whether the cause was looked for on the tokens that the engine's dump lists, since they are not the prompt's.
        stopped: why the hunt ended although no operation was identified.
    """

    rounds: tuple[Round, ...]
    explanation: Explanation | None = None
    unexplained: str = ""
    stopped: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default_factory=tuple)
    own_tokens: bool = False

    @property
    def verdict(self) -> Verdict:
        """The comparison of everything that was recorded."""
        return self.rounds[-1].verdict

    def __bool__(self) -> bool:
        return bool(self.verdict)
