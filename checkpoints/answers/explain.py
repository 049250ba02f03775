"""The result of `parity explain`: data; `reports` formats it."""

from typing import Any

from msgspec import Struct, field

from .diff import Seen


class Named(Struct, frozen=True):
    """A fault by name, with its parameters and layers; `layers` is None for all layers."""

    fault: str
    parameters: dict[str, Any]
    layers: tuple[int, ...] | None
    sentence: str


class Cause(Struct, frozen=True):
    """A fault that reproduces the recorded values.

    `explained` is the fraction of the differing records that it (with the causes before it) reproduces, `nmse` the worst error
    among those, `equivalent` other faults with the same numbers, `apart` a sentence on what would distinguish them.
    `hidden`: how its effect was found where every record passes as an arithmetic's noise; or "". `explained` is then a share of the error.
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
    hidden: str = ""


class Lead(Struct, frozen=True):
    """A fault that removes part of the error, or an observation about the numbers themselves.

    `removed` is the share of the squared error at the first divergence that it removes; None for an observation.
    """

    sentence: str
    removed: float | None = None
    named: Named | None = None


class DivergentPlace(Struct, frozen=True):
    """Where the dump first differs from the right engine."""

    checkpoint: str
    token_idx: int
    nmse: float
    limit: float


class TruthAt(Struct, frozen=True):
    """How far both sides are from float64 at the first differing place: NMSE of the dump, and of our right engine in float32."""

    ours: float
    right: float


class PossibleOperations(Struct, frozen=True):
    """Which operations may be wrong at the place that the causes leave unexplained.

    Attributes:
        operations: named by the points that they compute. agreeing: the recorded inputs of those operations, which agree.
        sure: the inputs were seen as whole rows. seen: how many values were seen of the least-seen input's row, and how many it has.
        behind: the operation is a product whose recorded elements are right, so that its inputs are right, seen or not.
    """

    operations: tuple[str, ...]
    agreeing: tuple[str, ...]
    sure: bool
    seen: tuple[int, int] | None = None
    behind: bool = False


class SuspectRecord(Struct, frozen=True):
    """A point whose records alone are wrong.

    `agreeing` are computed from it and agree, though they would not if the engine had gone on with what it recorded. `shows`: the order
    of elements that the record has instead, if that is known; what is computed from it may be recorded in that order as well, and
    `agreeing` are the next ones that are not.
    """

    checkpoint: str
    agreeing: tuple[str, ...]
    shows: str = ""


class Explanation(Struct, frozen=True):
    """The answer. True if there is no fault: nothing differs, or only by precision that can be judged.

    Attributes:
        first: where the dump first differs; None if it does not.
        last_agreement: the last point before it at which all records agree.
        causes: in the order in which they were found; together they explain `explained` of `differing` records.
        law: how the recorded elements of the place that is left come from the right ones, if one sentence says it for all; or "".
        rounds: whether that sentence says how a lower arithmetic rounds there: coarser than float32, and not wrong by itself.
        placed: which operations are in question there; None if its records alone are wrong.
        suspects: points whose records alone are wrong, the one that is left among them.
        looks_like: the arithmetic whose noise the numbers look like, where f32 is stated or a fault may hide in it; or "".
        f32_stated: who says that it was computed in float32: "header", "--compute", or "".
        truth: how far both sides are from float64 at the first place, where the arbiter was asked.
        remaining: the first place that the causes do not explain.
        seen: how much of each point's rows the dump shows.
        precision_only: the arithmetic that explains the difference: "f16", "bf16", "tf32", "q8", or "".
        precision_assumed: whether nothing says that the dump was computed in that arithmetic: a fault as small would look alike.
        hides: operations in question at the first place, and the part by which each one's result might be too large, with an error there
            as large as the one that an assumed arithmetic explains; the largest part first.
        passes: NMSE up to which a stated arithmetic's errors pass, at the point that allows most and in the logits (0: none compared).
        unjudged: points, the last one among them, whose values lower arithmetic moves as far as they are large: whether there is a fault
            cannot be said.
        left_open: a sentence on the first place, if a comparison leaves open whether it shows a fault or an arithmetic that rounds in
            another way; or "".
        precision_alike: other arithmetics that fit as well as `precision_only` or `looks_like`, so that they cannot be told apart.
        judged_as: a sentence on an unstated arithmetic that shows where the dump first differs, if its cost was the limit; or "".
        next: points to record now, as a `--points` value; next_slice: with so many values per row, None if that does not matter.
        complete: False if the search ran out of time.
    """

    records: int
    differing: int
    first: DivergentPlace | None
    last_agreement: str | None
    causes: tuple[Cause, ...] = ()
    leads: tuple[Lead, ...] = ()
    precision_only: str = ""
    precision_assumed: bool = False
    hides: tuple[tuple[str, float], ...] = ()
    passes: tuple[float, float] = (0.0, 0.0)
    unjudged: tuple[str, ...] = ()
    left_open: str = ""
    law: str = ""
    rounds: bool = False
    placed: PossibleOperations | None = None
    suspects: tuple[SuspectRecord, ...] = ()
    precision_alike: tuple[str, ...] = ()
    judged_as: str = ""
    looks_like: str = ""
    f32_stated: str = ""
    truth: TruthAt | None = None
    remaining: DivergentPlace | None = None
    next: str = ""
    next_slice: int | None = None
    faults: int = 0
    variants: int = 0
    nearest: float | None = None
    seconds: float = 0.0
    complete: bool = True
    notes: tuple[str, ...] = field(default_factory=tuple)
    seen: tuple[Seen, ...] = ()

    def __bool__(self) -> bool:
        return (self.first is None or bool(self.precision_only)) and not self.unjudged
