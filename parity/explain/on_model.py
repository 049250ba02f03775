"""A comparison where the model is at hand: arithmetic is measured on it, and float64 is asked where rounding is amplified."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.diff import AGREES, Limits, Pattern, Precision, Verdict
from checkpoints.answers.three_way import ThreeWay
from checkpoints.errors import ParityError
from checkpoints.points import LOGITS
from checkpoints.record import Dump, Rows
from engine.opened import open_plain
from engine.replay.precision import rounded
from engine.weights.gguf_model import GgufModel
from reports.sentences import ARITHMETIC

from ..arbiter.encoder_decoder import EncoderDecoderArbiter
from ..arbiter.third_side import AnyArbiter, with_truth
from ..diff.align import Pair, as_wide
from ..diff.compare import Comparison, Options, comparison
from ..diff.limits import EXACT_FLOOR, NATIVE, common_mode, limits
from ..diff.operations import MIXING
from ..diff.three_way import compare_three
from ..diff.three_way import with_truth as with_truth_of_three
from ..run.graphs import recorded_graph
from .case import Case, ExplainOptions
from .noise import ALL, AUTO, OFF
from .precision import KINDS, LOWER, UPPER, PrecisionFloor, best, cosine, floor, is_reproduced, mean_cost, mismatch, of_ids


def compared_on(
    ours: Dump, ref: Dump, options: Options, model: Path, arbiter: str = AUTO, *, third_side: bool = True
) -> Comparison:
    """Compare two dumps of a known model. Raises as `comparison` does.

    Where OURS computes in a lower arithmetic its limits are measured; where it does not say in which, the one that
    fits best is found. A model that our engine does not have is compared as though it were not known.

    Args:
        arbiter: "off", "auto" (float64 says which side is right where they differ in exact mode) or "all" (at every point).
        third_side: the answer says how far both sides are from float64; else float64 only sets limits.
    """
    known = _Model(_as_seen(ref, ours), model)
    found = _compared(ours, ref, replace(options, truth=None if arbiter == OFF else known), known)
    native = common_mode(ours.header, ref.header) == NATIVE
    if arbiter == OFF or not third_side or (arbiter == AUTO and (native or (found.verdict and not known.asked))):
        return found
    return found if known.truth is None else with_truth(found, known.truth, everywhere=arbiter == ALL)


def three_on(dumps: tuple[Dump, Dump, Dump], options: Options, model: Path, arbiter: str = AUTO) -> ThreeWay:
    """Compare three dumps of a known model: float64 sets limits as for two, and says who is wrong where they differ.

    Args:
        arbiter: "off", "auto" or "all" (which is here the same).

    Raises:
        InputError, DumpError: as `compare_three`.
    """
    if arbiter == OFF:
        return compare_three(dumps, options)
    known = _Model(next((dump for dump in reversed(dumps) if dump.header is not None and dump.header.tokens), dumps[1]), model)
    found = compare_three(dumps, replace(options, truth=known))
    return found if found or known.truth is None else with_truth_of_three(found, dumps, known)


def _of_encoder_decoder(ref: Dump, path: Path) -> EncoderDecoderArbiter | None:
    """The truth about the reference's prompt and what it generated, where the model is an encoder–decoder."""
    if ref.header is None or not ref.header.tokens:
        return None
    try:
        transformer = open_plain(GgufModel(path), recorded=partial(recorded_graph, path))
    except ParityError:
        return None
    if transformer.encoder is None:
        return None
    generated = sorted((token.token_idx, token.id) for token in ref.tokens if token.seq == 0)
    return EncoderDecoderArbiter(transformer, ref.header.tokens, [number for _, number in generated])


def _compared(ours: Dump, ref: Dump, options: Options, known: "_Model") -> Comparison:
    if options.tolerance is not None or options.limits is not None:
        return comparison(ours, ref, options)
    stated = (options.compute or (ours.header.compute if ours.header is not None else "")).lower()
    if stated in KINDS and (measured := known.limits(ours, stated)) is not None:
        return comparison(ours, ref, replace(options, limits=measured))
    if stated or common_mode(ours.header, ref.header) == NATIVE:
        return comparison(ours, ref, options)
    return _measured(ours, ref, options, known)


def _as_seen(ref: Dump, ours: Dump) -> Dump:
    """The reference with no more leading values than ours has: what an arithmetic costs is measured on the values that are compared."""
    mine = ours.points
    return replace(ref, points={name: as_wide(rows, mine[name]) if name in mine else rows for name, rows in ref.points.items()})


@dataclass(frozen=True)
class _Model:
    """What a model file tells of the reference's dump, computed when it is first asked for; nothing where our engine lacks the model."""

    ref: Dump
    path: Path

    @cached_property
    def case(self) -> Case | None:
        """The right engine beside the reference: the reference's tokens and positions are known, those of bare lines are not."""
        try:
            return Case(self.ref, self.path, ExplainOptions())
        except ParityError:
            return None

    @cached_property
    def truth(self) -> AnyArbiter | None:
        """The steps in float64 over the reference's tokens; None where our engine lacks the model."""
        return self.case.arbiter if self.case is not None else _of_encoder_decoder(self.ref, self.path)

    @property
    def asked(self) -> bool:
        """Whether float64 was asked for anything by now."""
        return "truth" in self.__dict__ and self.truth is not None and self.truth.asked

    def distances(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """How far records are from float64 (`Truth`)."""
        return {} if self.truth is None else self.truth.distances(points)

    def own_rounding(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """How far float32 is from float64 at records (`Truth`)."""
        return {} if self.truth is None else self.truth.own_rounding(points)

    def from_table(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """How far records are from float32 with ggml's tables (`Truth`)."""
        return {} if self.truth is None else self.truth.from_table(points)

    def spread(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """How far rounding alone moves records (`Truth`)."""
        return {} if self.truth is None else self.truth.spread(points)

    def one_entry(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """What one entry of a table makes of records (`Truth`)."""
        return {} if self.truth is None else self.truth.one_entry(points)

    @property
    def coarse(self) -> frozenset[str]:
        """The points that the reference itself computes coarsely."""
        return frozenset() if self.truth is None else self.truth.coarse

    def untouched(self, kind: str, point: str) -> bool:
        """Whether products in an arithmetic leave a point as float32 does: 8 bits a block hold an IQ4_NL embedding exactly, say."""
        entry = None if self.case is None else next((one for one in self.case.entries if one.point == point), None)
        if self.case is None or entry is None:
            return False
        case = self.case
        rounded_values = case.make(rounded(case.transformer.steps, kind, storage=False), len(case.positions))
        cost = entry.between(rounded_values.on_host[point], case.replay.on_host[point], case.positions)
        return mean_cost(cost) <= EXACT_FLOOR.operations

    def alike(self, kind: str, pair: Pair) -> float:
        """The mean cosine of a point's errors to those of our own rounding, of products or of all activations, whichever is nearer."""
        entry = None if self.case is None else next((one for one in self.case.entries if one.point == pair.point), None)
        if self.case is None or entry is None or pair.ours.indices is not None:
            return 0.0
        case, nearest = self.case, 0.0
        rows = {
            (int(s), int(t)): r for r, (s, t) in enumerate(zip(entry.pair.ours.seq, entry.pair.ours.token_idx, strict=True))
        }
        keys = list(zip(pair.ref.seq.tolist(), pair.ref.token_idx.tolist(), strict=True))
        index = np.array([rows.get(key, -1) for key in keys])
        width = min(pair.ours.values.shape[1], entry.values.shape[1])
        inside = (np.arange(width)[None, :] < pair.ours.counts[:, None]) & (index >= 0)[:, None]
        right = entry.taken(case.replay.on_host[pair.point], case.positions)[index, :width]
        for storage in (False, True):
            values = case.make(rounded(case.transformer.steps, kind, storage=storage), len(case.positions))
            mine = entry.taken(values.on_host[pair.point], case.positions)[index, :width]
            theirs = pair.ours.values[:, :width].astype(np.float64)
            usable = inside & np.isfinite(theirs) & np.isfinite(mine) & np.isfinite(right)
            nearest = max(nearest, cosine(*(np.where(usable, one, 0.0) - np.where(usable, right, 0.0) for one in (theirs, mine))))
        return nearest

    def floor(self, kind: str) -> PrecisionFloor | None:
        """What an arithmetic costs our right engine at each record of the reference."""
        case = self.case
        return (
            None if case is None else floor(kind, case.entries, case.transformer.steps, case.replay, case.make, case.positions)
        )

    def limits(self, ours: Dump, kind: str, cost: PrecisionFloor | None = None) -> Limits | None:
        """Limits by point for a side in that arithmetic: `UPPER` times the measured cost, never below what the files' own types allow."""
        cost = cost or self.floor(kind)
        if cost is None or self.case is None:
            return None
        header = replace(ours.header, compute="f32") if ours.header is not None else None
        types = limits(header, self.ref.header, compute="f32")
        least = {True: types.logits, False: types.operations}
        points = {
            entry.point: max(0.0 if of_ids(entry) else UPPER * float(mean), least[entry.point == LOGITS])
            for entry, mean in zip(self.case.entries, cost.cost(), strict=True)
        }
        others = [limit for name, limit in points.items() if name != LOGITS]
        return Limits(
            max(others, default=types.operations),
            points.get(LOGITS, types.logits),
            f"measured: {UPPER:g} times what {kind} arithmetic costs our engine on this model and prompt, by point",
            points=points,
        )


def _measured(ours: Dump, ref: Dump, options: Options, known: _Model) -> Comparison:
    """Nothing says what OURS computes in: float32, unless its first computed point differs as a lower arithmetic does."""
    exact = comparison(ours, ref, replace(options, compute="f32"))
    as_float32 = _with(exact, "f32", "")
    first = exact.verdict.first_divergence
    if exact.verdict or first is None or first.checkpoint not in exact.records.names:
        return as_float32
    before = _computed_before(exact, first.checkpoint)
    if known.case is None:
        return as_float32 if before else comparison(ours, ref, options)
    kinds = [kind for kind in KINDS if not before or known.untouched(kind, before)]
    wanted = next((number for number, entry in enumerate(known.case.entries) if entry.point == first.checkpoint), None)
    if wanted is None:
        return as_float32
    error = float(np.mean(exact.records.measures.nmse[exact.records.point == exact.records.names.index(first.checkpoint)]))
    candidates: dict[str, Comparison] = {}
    far: dict[str, float] = {}
    doubtful: list[str] = []
    for kind in kinds:
        cost = known.floor(kind)
        allowed = known.limits(ours, kind, cost)
        if cost is None or allowed is None:
            continue
        if not mean_cost(cost.products[wanted]) * LOWER <= error <= allowed.points[first.checkpoint]:
            continue
        if _spared(exact, known.case, cost):
            continue
        tried = comparison(ours, ref, replace(options, compute=kind, limits=allowed))
        if any(point.checkpoint == first.checkpoint and point.status == AGREES for point in tried.verdict.points):
            errors = _errors(exact, known.case, cost)
            pair = exact.records.pairs[exact.records.names.index(first.checkpoint)]
            if not is_reproduced(kind, known.alike(kind, pair), errors):
                doubtful.append(kind)
                continue
            candidates[kind], far[kind] = tried, mismatch(errors)
    agreeing = {kind: far[kind] for kind, found in candidates.items() if found.verdict}
    fitting = best(agreeing or far)
    if not fitting and doubtful:
        return replace(as_float32, verdict=_of_their_size(as_float32.verdict, doubtful))
    return _with(candidates[fitting[0]], fitting[0], first.checkpoint, fitting[1:]) if fitting else as_float32


def _of_their_size(verdict: Verdict, kinds: Sequence[str]) -> Verdict:
    """A divergence as large as lower arithmetics would make it, which are not what makes it as far as our own rounding shows."""
    named = " or ".join(ARITHMETIC[kind] for kind in kinds)
    sentence = (
        f"as large as {named} arithmetic makes it, but not where our own rounding puts it: a fault, or an arithmetic that rounds in "
        f"another way (--compute {kinds[0]} allows for it; `parity explain` and more points and values tell)"
    )
    return replace(verdict, pattern=Pattern("undecided", sentence), operation="")


def _with(found: Comparison, arithmetic: str, in_float32: str, alike: tuple[str, ...] = ()) -> Comparison:
    precision = Precision(arithmetic, False, "measured", in_float32, alike)
    return replace(found, verdict=replace(found.verdict, precision=precision))


def _errors(exact: Comparison, case: Case, cost: PrecisionFloor) -> list[tuple[float, float, float]]:
    """Of each point the mean error, and what the arithmetic costs there: with products, and with activations rounded."""
    records = exact.records
    numbers = {name: number for number, name in enumerate(records.names)}
    return [
        (float(records.measures.nmse[records.point == numbers[entry.point]].mean()), mean_cost(one), mean_cost(two))
        for entry, one, two in zip(case.entries, cost.products, cost.storage, strict=True)
        if entry.point in numbers
    ]


def _computed_before(found: Comparison, first: str) -> str:
    """A product with weights that agrees as float32 does before the first difference, "" without one.

    Then the arithmetic is float32, or one that this product is exact in (`_Model.untouched`).
    """
    model = found.records.flow
    for point in found.verdict.points:
        if point.checkpoint == first:
            break
        behind = {point.checkpoint, *_above(found, point.checkpoint)} if point.checkpoint in model.whole.made else set[str]()
        if point.status == AGREES and MIXING & model.operations(behind):
            return point.checkpoint
    return ""


def _spared(exact: Comparison, case: Case, cost: PrecisionFloor) -> bool:
    """Whether records that this arithmetic must have moved are right as float32 is: a point as a whole."""
    records = exact.records
    for entry, products in zip(case.entries, cost.products, strict=True):
        if entry.point not in records.names:
            continue
        here = records.point == records.names.index(entry.point)
        errors, limits = records.measures.nmse[here], records.limit[here]
        typical = float(np.median(products))  # rounding flips a choice of experts here and there, which costs far more
        if not np.isfinite(typical):
            continue  # rows of zeros, masks
        if typical > float(limits.max()) and float(errors.mean()) < LOWER * typical:
            return True
    return False


def _above(found: Comparison, name: str) -> set[str]:
    """All nodes that a point is made of."""
    made = found.records.flow.whole.made
    every, waiting = set[str](), [name]
    while waiting:
        for other in made[waiting.pop()].reads:
            if other not in every:
                every.add(other)
                waiting.append(other)
    return every
