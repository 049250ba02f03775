"""What a comparison found: pure data. `parity.compare` makes it, `reports` formats it.

Numbers that are not known are None; an error that no number expresses (NaN on one side only) is infinite.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

PARITY = "parity"
DIVERGENCE = "divergence"

AGREES = "agrees"
FRESH = "fresh"  # the error jumps here
INHERITED = "inherited"  # wrong, but not more so than what it is made from explains
GROWN = "grown"  # over the limit without a jump anywhere before it
OTHERWISE = "recorded otherwise"  # the operation is right, the record shows something else


@dataclass(frozen=True)
class Difference:
    """One compared record.

    `nmse` is the larger of `nmse_slice` (the recorded values) and `nmse_row` (the whole row: exact where it was recorded
    whole, else estimated from the sketch, else a lower bound from the statistics; None where nothing is known of it).
    `of_limit` is the error in proportion to the limit; the record fails above 1. `jump` is `nmse` over the worst error
    upstream. `index` names the element of `max_abs`, and likewise for `relative` and `ulp`. `ours` and `ref` are the first values.
    """

    checkpoint: str
    layer: int | None
    token_idx: int
    nmse: float | None
    max_abs: float | None
    limit: float
    ours: tuple[float, ...] = ()
    ref: tuple[float, ...] = ()
    fresh: bool = False
    seq: int = 0
    step: int = 0
    phase: str = ""
    token: str | None = None
    nmse_slice: float | None = None
    nmse_row: float | None = None
    of_limit: float = 0.0
    jump: float | None = None
    index: int | None = None
    cosine: float | None = None
    relative: float | None = None
    relative_index: int | None = None
    ulp: float | None = None
    ulp_index: int | None = None
    nonfinite_ours: int = 0
    nonfinite_ref: int = 0
    future_mass: float | None = None


@dataclass(frozen=True)
class Origin:
    """A point with failing records that no earlier failing record explains; `first` is the first of them."""

    first: Difference
    positions: tuple[int, ...]


@dataclass(frozen=True)
class PointSummary:
    """All compared records of one point: how many there are and failed, the worst of them, and what became of the point."""

    checkpoint: str
    layer: int | None
    records: int
    failed: int
    status: str
    worst: Difference


@dataclass(frozen=True)
class Agreement:
    """The last point before the first divergence that agrees at all its positions up to it; `whole`: at all there are."""

    checkpoint: str
    positions: int
    whole: bool


@dataclass(frozen=True)
class Pattern:
    """What the shape of the error says for free: a stable code and a sentence."""

    code: str
    sentence: str


@dataclass(frozen=True)
class RecordFault:
    """Records that show something else than their name says, while everything made from them agrees: the operation is right.

    `kind`: "layout" (another order of the elements), "name" (another point of the layer), "moment" (another time: captured late, or
    before a scale), "nonfinite" (NaN that nothing made from it has) or "unknown". `map` is the line of a `--map` file that settles it,
    empty where none does.
    """

    checkpoint: str
    layer: int | None
    kind: str
    positions: tuple[int, ...]
    records: int
    sentence: str
    map: str = ""


@dataclass(frozen=True)
class Seen:
    """How much of a point's rows the comparison saw: `values` of `of` elements (None: not known) and whether a sketch, or the
    statistics, tell of the rest."""

    checkpoint: str
    values: int
    of: int | None
    sketch: bool
    statistics: bool

    @property
    def whole(self) -> bool:
        """Whether nothing of the rows was left out."""
        return self.sketch or self.statistics or (self.of is not None and self.values >= self.of)


@dataclass(frozen=True)
class Precision:
    """The arithmetic (f32, tf32, f16, bf16, q8) at which the sides agree, or in which they were judged; empty where modes mix.

    `source`: "stated" by a header or --compute, "measured" on the model, "assumed" where nothing says it; `assumed` is True for the
    last, unless all records agree as float32 does. `in_float32` is the first point that would be a divergence in float32, empty
    if none would. `alike`: other arithmetics that fit the measured differences as well.
    """

    arithmetic: str
    assumed: bool
    source: str
    in_float32: str = ""
    alike: tuple[str, ...] = ()


@dataclass(frozen=True)
class TruthPoint:
    """How far both sides are from the same steps in float64 at one point: NMSE of the worst record of each, None where it is not known.

    `alone` is the side that is far from it while the other is near ("ours" or "reference"), empty where both are about as far.
    """

    checkpoint: str
    ours: float | None
    ref: float | None
    alone: str = ""


@dataclass(frozen=True)
class TruthRecord(TruthPoint):
    """The same of one record, the one that an answer is about; `values` are its first values in float64, as float32 shows them."""

    token_idx: int = 0
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Missing:
    """What one side lacks of the other: points it has nothing of, positions lacking in common points, records in all."""

    points: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    records: int = 0


@dataclass(frozen=True)
class Choices:
    """The next token as both sides would choose it.

    `known` counts the positions where both first choices are known, `agree` those where they are the same. The rest needs
    whole rows: `rows` of them were there. `top_k` is the mean share of the reference's `k` best that are among ours.
    `margin` is the smallest distance of the reference's first two choices. The first differing choice: `differs_at`, with both ids.
    """

    known: int
    agree: int
    rows: int = 0
    kl: float | None = None
    k: int = 0
    top_k: float | None = None
    margin: float | None = None
    differs_at: int | None = None
    ours_id: int | None = None
    ref_id: int | None = None
    differs_margin: float | None = None


@dataclass(frozen=True)
class Limits:
    """The limits that were applied; `assumed` where the arithmetic of one side is not known.

    `points` holds limits of single points that were measured; of these `operations` is the largest.
    """

    operations: float
    logits: float
    source: str
    assumed: bool = False
    points: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The answer to "do these two dumps agree?"; true for parity.

    `next` is a `--points` value, empty where the records name the operation already (then `operation` says it).
    `left_out` counts records after the place where the token sequences part. `next_slice` is how many leading values the next run has
    to record, where what was seen of the rows does not settle it. `truth` is what float64 says of the first divergence (of the worst
    record where there is none), `truth_points` of the points in dataflow order; both are empty where it was not asked.
    """

    verdict: str
    compared: int
    mode: str
    limits: Limits
    points: tuple[PointSummary, ...] = ()
    worst: Difference | None = None
    first_divergence: Difference | None = None
    origins: tuple[Origin, ...] = ()
    last_agreement: Agreement | None = None
    next: str = ""
    operation: str = ""
    pattern: Pattern | None = None
    missing_ours: Missing = field(default_factory=Missing)
    missing_ref: Missing = field(default_factory=Missing)
    choices: Choices | None = None
    left_out: int = 0
    notes: tuple[str, ...] = ()
    record_faults: tuple[RecordFault, ...] = ()
    seen: tuple[Seen, ...] = ()
    next_slice: int | None = None
    precision: Precision | None = None
    truth: TruthRecord | None = None
    truth_points: tuple[TruthPoint, ...] = ()

    def __bool__(self) -> bool:
        return self.verdict == PARITY
