"""What comparing an engine with itself found: one entry a way of computing the same positions."""

from dataclasses import dataclass

from .diff import Verdict


@dataclass(frozen=True)
class Check:
    """One way against another.

    Attributes:
        name: short ("one token at a time"); `what` the two ways in words.
        verdict: the comparison; None where it could not be made (`reason` says why).
        suspect: "cache", "positions", "mask", "batch size", "sequences", "state" or "" where nothing differs; `reason` explains it.
        differs: the first point of which any value differs at all, be it by a rounding; "" where both are the same bits.
    """

    name: str
    what: str
    verdict: Verdict | None
    suspect: str = ""
    reason: str = ""
    differs: str = ""


@dataclass(frozen=True)
class Consistency:
    """The whole answer."""

    engine: str
    checks: tuple[Check, ...]
    not_checked: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return all(check.verdict is None or bool(check.verdict) for check in self.checks)
