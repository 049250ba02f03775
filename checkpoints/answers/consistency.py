"""The result of comparing an engine with itself: one entry for each way of computing the same positions."""

from msgspec import Struct

from .diff import Verdict


class Check(Struct, frozen=True):
    """One way against another.

    Attributes:
        name: short ("one token at a time"); `what` describes both ways.
        verdict: the comparison; None if it could not be made (`reason` says why).
        suspect: "cache", "positions", "mask", "batch size", "sequences", "state", or "" if nothing differs; `reason` explains it.
        differs: the first point at which any value differs, even by a rounding; "" if both are bit-identical.
    """

    name: str
    what: str
    verdict: Verdict | None
    suspect: str = ""
    reason: str = ""
    differs: str = ""


class Consistency(Struct, frozen=True):
    """The whole answer."""

    engine: str
    checks: tuple[Check, ...]
    not_checked: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return all(check.verdict is None or bool(check.verdict) for check in self.checks)
