"""The result of a check against golden dumps, and a line of its ledger: pure data. `parity.drift` makes it, `reports` formats it."""

from typing import Any

from msgspec import Struct, field

from .diff import DIVERGENCE, PARITY, Verdict


class Margin(Struct, frozen=True):
    """The worst record of one point over all prompts. `of_limit` is its error divided by its limit.

    `prompt` is the prompt's number, `before` the smallest such ratio in earlier checks (None: no earlier check).
    """

    checkpoint: str
    nmse: float
    limit: float
    of_limit: float
    prompt: int = 0
    token_idx: int = 0
    before: float | None = None

    @property
    def margin(self) -> float | None:
        """By what factor the error may still grow; None if there is no error."""
        return 1 / self.of_limit if self.of_limit else None


class Checked(Struct, frozen=True):
    """One prompt of the set, and its comparison."""

    prompt: str
    verdict: Verdict


class Change(Struct, frozen=True):
    """A version or setting that has changed."""

    what: str
    before: str
    now: str


class Drift(Struct, frozen=True):
    """The answer to "has anything moved?"; true where nothing left its limit.

    `golden` and `side` describe the two in a line each. `findings` are sentences about errors that are within their limits but growing
    or close to them. `updated` lists (prompt number, point) of the golden records that were rewritten.
    """

    golden: str
    side: str
    checked: tuple[Checked, ...]
    points: tuple[Margin, ...]
    changes: tuple[Change, ...] = ()
    findings: tuple[str, ...] = ()
    updated: tuple[tuple[int, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return all(item.verdict for item in self.checked)

    @property
    def verdict(self) -> str:
        """ "parity" or "divergence"."""
        return PARITY if self else DIVERGENCE

    @property
    def assumed(self) -> tuple[Verdict, ...]:
        """The agreements that hold only by an assumed limit: nothing says what the engine computes in, and it is not float32's error."""
        return tuple(item.verdict for item in self.checked if item.verdict and item.verdict.limit_assumed)

    @property
    def compared(self) -> int:
        """The number of records of all prompts."""
        return sum(item.verdict.compared for item in self.checked)


class Closer(Struct, frozen=True):
    """A point (or a cell of a conformance run) that is closer to its limit than before; both errors are divided by the limit."""

    name: str
    before: float
    now: float
    since: str


class Entry(Struct, frozen=True):
    """One check (or one conformance run, with cells in place of points) as the ledger keeps it.

    `points`: point -> (nmse, limit, of_limit); `golden` distinguishes sets of dumps.
    """

    time: str
    commit: str
    verdict: str
    source: str
    golden: str
    versions: dict[str, str] = field(default_factory=dict)
    points: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What was checked, when and with which versions, and the verdict: what the ledger's line and the history both begin with."""
        names = ("time", "commit", "verdict", "source", "golden", "versions")
        return {name: getattr(self, name) for name in names}
