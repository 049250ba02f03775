"""The result of a comparison: pure data. `parity.diff.compare` makes it, `reports` formats it.

Unknown numbers are None; an error that no number expresses (NaN on one side only) is infinite.
"""

from collections.abc import Mapping

from msgspec import Struct, field

from ..points import LOGITS

PARITY = "parity"
DIVERGENCE = "divergence"
INCOMPLETE = "incomplete"  # what was compared agrees, but the result was not compared, or cannot be judged

AGREES = "agrees"
FRESH = "fresh"  # the error jumps here
INHERITED = "inherited"  # wrong, but no more than the error of its inputs explains
GROWN = "grown"  # over the limit without a jump anywhere before it
OTHERWISE = "recorded otherwise"  # the operation is right, but the record shows another value
UNJUDGED = "cannot be judged"  # agrees only by a limit that refuses nothing


class Difference(Struct, frozen=True):
    """One compared record.

    `nmse` is the larger of `nmse_slice` (the recorded values) and `nmse_row` (the whole row: exact if it was recorded
    whole, otherwise estimated from the sketch, otherwise a lower bound from the statistics; None if nothing is known of it).
    `of_limit` is the error divided by the limit; the record fails above 1. `jump` is `nmse` divided by the worst error
    upstream. `index` names the element with the error `max_abs`, and likewise for `relative` and `ulp`. `ours` and `ref` are the first
    values.
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


class Origin(Struct, frozen=True):
    """A point with failing records that no earlier failing record explains; `first` is the earliest of them."""

    first: Difference
    positions: tuple[int, ...]


class PointSummary(Struct, frozen=True):
    """All compared records of one point: how many there are, how many failed, the worst one, and the verdict on the point."""

    checkpoint: str
    layer: int | None
    records: int
    failed: int
    status: str
    worst: Difference


class Agreement(Struct, frozen=True):
    """The last point before the first divergence that agrees at every position up to it; `whole`: at every position of the dump."""

    checkpoint: str
    positions: int
    whole: bool


class Pattern(Struct, frozen=True):
    """What the shape of the error suggests on its own: a stable code and a sentence."""

    code: str
    sentence: str


class RecordFault(Struct, frozen=True):
    """Records that show something other than their name says, while everything computed from them agrees: the operation is right.

    `kind`: "layout" (another order of the elements), "length" (longer or shorter rows), "name" (another point of the layer), "moment"
    (another time: captured late, or before a scale), "type" (rounded, or misread bits), "nonfinite" (NaN or infinity that nothing made from
    it has) or "unknown". `map` is the line of a `--map` file that settles it, empty where none does.
    """

    checkpoint: str
    layer: int | None
    kind: str
    positions: tuple[int, ...]
    records: int
    sentence: str
    map: str = ""


class Seen(Struct, frozen=True):
    """How much of a point's rows the comparison saw: `values` of `of` elements (None: unknown), and whether a sketch or
    statistics cover the rest."""

    checkpoint: str
    values: int
    of: int | None
    sketch: bool
    statistics: bool

    @property
    def whole(self) -> bool:
        """Whether whole rows were seen."""
        return self.sketch or self.statistics or (self.of is not None and self.values >= self.of)


class Precision(Struct, frozen=True):
    """The arithmetic (f32, tf32, f16, bf16, q8) at which the sides agree, or by which they were judged; empty if modes are mixed.

    `source`: "stated" by a header or --compute, "measured" on the model, "assumed" if nothing states it; `assumed` is true for the
    last one, unless all records agree even in float32. `in_float32` is the first point that would be a divergence in float32, empty
    if there is none. `alike`: other arithmetics that fit the measured differences equally well.
    """

    arithmetic: str
    assumed: bool
    source: str
    in_float32: str = ""
    alike: tuple[str, ...] = ()


class TruthPoint(Struct, frozen=True):
    """How far both sides are from a float64 computation of the same steps at one point: NMSE of each side's worst record, or None.

    `alone` is the side that is far from it while the other is near ("ours" or "reference"), empty if both are about equally far.
    """

    checkpoint: str
    ours: float | None
    ref: float | None
    alone: str = ""


class TruthRecord(TruthPoint, frozen=True):
    """The same for the single record that an answer is about; `values` are its first values in float64, rounded to float32."""

    token_idx: int = 0
    values: tuple[float, ...] = ()


class Missing(Struct, frozen=True):
    """What one side lacks: points with no record at all, positions missing from common points, and the number of records."""

    points: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    records: int = 0


class Uncompared(Struct, frozen=True):
    """What was asked for and never compared; false if nothing is.

    `requested` is how many points of the vocabulary were asked for, `points` are those without any compared record, in dataflow order,
    `positions` those at which no point was compared. `after`: the last point that was compared, if nothing after it was; empty if
    something was, or if no point of those asked for was compared.
    """

    requested: int = 0
    points: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    after: str = ""

    def __bool__(self) -> bool:
        return bool(self.points or self.positions)


class Unjudged(Struct, frozen=True):
    """Records that agree only because their measured limit refuses nothing: a row of zeros would pass. False if there are none.

    `points` are theirs, in dataflow order. `result`: whether the last compared point is one of them.
    """

    records: int = 0
    points: tuple[str, ...] = ()
    result: bool = False

    def __bool__(self) -> bool:
        return self.records > 0


class Choices(Struct, frozen=True):
    """The next token as each side would choose it.

    `known` counts the positions at which both first choices are known, `agree` those at which they are equal. The other figures need
    whole rows, of which there were `rows`. `top_k` is the mean share of the reference's `k` best tokens that are among ours.
    `margin` is the smallest gap between the reference's first two choices. `differs_at` is the first position where the choices
    differ, with both ids.
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


class RowLimit(Struct, frozen=True):
    """The limit of a single record, whose row is all but zero."""

    checkpoint: str
    seq: int
    token_idx: int
    limit: float


class Limits(Struct, frozen=True):
    """The limits that were applied; `assumed` if the arithmetic of one side is unknown.

    `points` holds the measured limits of single points; `operations` is the largest of them. `rows` are records with larger ones of
    their own.
    """

    operations: float
    logits: float
    source: str
    assumed: bool = False
    points: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[RowLimit, ...] = ()

    def at(self, point: str) -> float:
        """The limit of a point: its own if it was measured, else that of the logits or of all other points."""
        return self.points.get(point, self.logits if point == LOGITS else self.operations)


class Verdict(Struct, frozen=True):
    """The answer to "do these two dumps agree?"; true for parity.

    `verdict` is INCOMPLETE if an engine was asked for its result and did not print it, or if no limit can judge the result, although all
    that was compared agrees. `uncompared` is what of the other side's records, or of what an engine was asked for, was never compared.
    `next` is a `--points` value, empty if the records already identify the operation (then `operation` names it).
    `left_out` counts records after the position at which the token sequences diverge. `next_slice` is how many leading values the next
    run has to record if too little of the rows was seen. `excused` records are over the table's limit and agree by an assumption about
    rounding (a note says which), in whose place the model would put float64's answer. `truth` is what float64 says about the first
    divergence (about the worst record if there is none), `truth_points` about the points in dataflow order; both are empty if float64
    was not computed. `ignored` are sentences on numbers of the file's metadata that the reference does not compute with: where there are
    any, a side that differs from it may be right.
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
    uncompared: Uncompared = field(default_factory=Uncompared)
    unjudged: Unjudged = field(default_factory=Unjudged)
    choices: Choices | None = None
    left_out: int = 0
    excused: int = 0
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    record_faults: tuple[RecordFault, ...] = ()
    seen: tuple[Seen, ...] = ()
    next_slice: int | None = None
    precision: Precision | None = None
    truth: TruthRecord | None = None
    truth_points: tuple[TruthPoint, ...] = ()

    @property
    def limit_assumed(self) -> bool:
        """Whether nothing says what a side computes in, and the errors are larger than float32's: a narrower limit might be exceeded."""
        return self.limits.assumed and (self.precision is None or self.precision.arithmetic != "f32")

    def __bool__(self) -> bool:
        return self.verdict == PARITY
