"""What `parity explain` found: data; `reports` formats it."""

from dataclasses import dataclass, field
from typing import Any

from .diff import Seen


@dataclass(frozen=True)
class Named:
    """A fault by name, with its parameters and layers; `layers` is None for all of them."""

    fault: str
    parameters: dict[str, Any]
    layers: tuple[int, ...] | None
    sentence: str


@dataclass(frozen=True)
class Cause:
    """A fault that reproduces the recorded values.

    `explained` is the fraction of the differing records that it (with the causes before it) reproduces, `nmse` the worst
    of those, `equivalent` other faults with the same numbers, `apart` a sentence on what would tell them apart.
    """

    named: Named
    explained: float
    records: int
    nmse: float
    symptom: str
    fix: str
    seen: str
    equivalent: tuple[Named, ...] = ()
    apart: str = ""


@dataclass(frozen=True)
class Lead:
    """Something that takes a part of the error away, or that the numbers themselves say.

    `removed` is the part of the squared error at the first divergence that it takes away; None for an observation.
    """

    sentence: str
    removed: float | None = None
    named: Named | None = None


@dataclass(frozen=True)
class Place:
    """Where the dump first differs from the right engine."""

    checkpoint: str
    token_idx: int
    nmse: float
    limit: float


@dataclass(frozen=True)
class TruthAt:
    """How far both sides are from the same steps in float64 at the first place: NMSE of the dump, and of our right engine in float32."""

    ours: float
    right: float


@dataclass(frozen=True)
class Placed:
    """Which operations are in question at the place that the causes leave.

    Attributes:
        operations: the names of what they make. agreeing: the recorded points that go into them, which agree.
        sure: these were seen as whole rows. seen: how many values of a row of the one that was seen least, and how many it has.
    """

    operations: tuple[str, ...]
    agreeing: tuple[str, ...]
    sure: bool
    seen: tuple[int, int] | None = None


@dataclass(frozen=True)
class Explanation:
    """The answer. It is truthy when there is no fault: nothing differs, or by precision only.

    Attributes:
        first: where the dump first differs, None where it does not.
        last_agreement: the last point in front of it at which all records agree.
        causes: in the order in which they were found; together they explain `explained` of `differing` records.
        law: how the recorded elements of the place that is left come from the right ones, if one sentence says it for all; or "".
        placed: which operations are in question there.
        looks_like: the arithmetic whose noise the numbers look like, where f32 is stated or a fault may hide in it; or "".
        f32_stated: who says that it was computed in float32: "header", "--compute", or "".
        truth: how far both sides are from float64 at the first place, where the arbiter was asked.
        remaining: the first place that the causes do not explain.
        seen: how much of each point's rows the dump tells.
        precision_only: the arithmetic that explains the difference: "f16", "bf16", "tf32", "q8", or "".
        precision_alike: others that fit as well as that or `looks_like`, so that they cannot be told apart.
        next: points to record now, as a `--points` value.
        complete: False if the search ran out of time.
    """

    records: int
    differing: int
    first: Place | None
    last_agreement: str | None
    causes: tuple[Cause, ...] = ()
    leads: tuple[Lead, ...] = ()
    precision_only: str = ""
    law: str = ""
    placed: Placed | None = None
    precision_alike: tuple[str, ...] = ()
    looks_like: str = ""
    f32_stated: str = ""
    truth: TruthAt | None = None
    remaining: Place | None = None
    next: str = ""
    faults: int = 0
    variants: int = 0
    nearest: float | None = None
    seconds: float = 0.0
    complete: bool = True
    notes: tuple[str, ...] = field(default_factory=tuple)
    seen: tuple[Seen, ...] = ()

    def __bool__(self) -> bool:
        return self.first is None or bool(self.precision_only)
