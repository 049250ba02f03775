"""A comparison if the model is available: the cost of an arithmetic is measured on it, and float64 decides where rounding is amplified."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from checkpoints.answers.diff import Pattern
from checkpoints.record import Dump
from reports.sentences import ARITHMETIC

from ..diff.compare import Comparison, Options, comparison
from ..diff.limits import NATIVE, common_mode, limits
from ..diff.measured.align import as_wide
from ..diff.tolerances.truth import ALL, AUTO, OFF
from .rounding.known_model import KnownModel

if TYPE_CHECKING:
    from checkpoints.answers.three_way import ThreeWay
    from engine.transformer import Transformer


_FOR_WEIGHTS = 20.0  # seconds for runs with rounded weights, of which a dozen operations are tried first
_REPRODUCED = 20.0  # seconds for our own runs where limits cannot judge: some dozen, each at most as long as the floor's


def compared_on(
    ours: Dump,
    ref: Dump,
    options: Options,
    model: Path,
    arbiter: str = AUTO,
    *,
    third_side: bool = True,
    opened: "Transformer | None" = None,
) -> Comparison:
    """Compare two dumps of a known model. Raises as `comparison` does.

    If OURS computes in a lower arithmetic, its limits are measured; if it does not say in which, the one that
    fits best is found. A model that our engine cannot compute is compared as though it were not known.

    Args:
        arbiter: "off", "auto" (float64 says which side is right where they differ in exact mode) or "all" (at every point).
        third_side: whether the answer says how far both sides are from float64; else float64 only sets limits.
        opened: our engine of the model, if it is open.
    """
    known = KnownModel(_as_seen(ref, ours), model, opened)
    compared = _compared(ours, ref, replace(options, truth=None if arbiter == OFF else known), known)
    if not compared.verdict:
        compared = _beside_twin(compared, ours, ref, options, model, arbiter)
    if not compared.verdict:
        compared = replace(compared, verdict=replace(compared.verdict, ignored=known.ignored))
    else:
        compared = _without_unjudged(compared, ours, options, known)
    native = common_mode(ours.header, ref.header) == NATIVE
    if arbiter == OFF or not third_side or (arbiter == AUTO and (native or (compared.verdict and not known.started))):
        return compared
    if known.truth is None:
        return compared
    from ..arbiter.third_side import with_truth

    return with_truth(compared, known.truth, everywhere=arbiter == ALL)


def _without_unjudged(compared: Comparison, ours: Dump, options: Options, known: KnownModel) -> Comparison:
    """The comparison without the records that measured limits, if it was made by such, cannot judge.

    An engine whose every record is that of our own run in its arithmetic is right, however wide those limits are.
    """
    if not compared.verdict.limits.points:
        return compared
    from ..diff.unjudged import without_unjudged

    precision = compared.verdict.precision
    kind = options.compute or (precision.arithmetic if precision is not None else "")
    judged = without_unjudged(compared, limits(ours.header, known.ref.header, compute=kind or None))
    if not judged.verdict.unjudged:
        return judged
    from .budget import Budget
    from .rounding.precision import KINDS
    from .rounding.reproduced import is_reproduced

    # Limits that were measured for a file's own types are those of no arithmetic in which our engine could be run.
    if kind not in KINDS or (case := known.beside_ours(ours, compared)) is None:
        return judged

    return compared if is_reproduced(case, kind, Budget(_REPRODUCED)) else judged


def _beside_twin(compared: Comparison, ours: Dump, ref: Dump, options: Options, model: Path, arbiter: str) -> Comparison:
    """The comparison, judged by what native types cost this model if the reference has them."""
    if ref.header is None or ref.header.mode != NATIVE:
        return compared
    from .rounding.beside_twin import beside_twin

    exactly = partial(compared_on, model=model, arbiter=arbiter, third_side=False)
    return beside_twin(compared, ours, ref, options, model, exactly)


def three_on(dumps: tuple[Dump, Dump, Dump], options: Options, model: Path, arbiter: str = AUTO) -> "ThreeWay":
    """Compare three dumps of a known model: float64 sets limits as for two, and says who is wrong where they differ.

    Args:
        arbiter: "off", "auto" or "all" (which is here the same).

    Raises:
        InputError, DumpError: as `compare_three`.
    """
    from ..diff.three_way import compare_three, with_truth

    known = KnownModel(
        next((dump for dump in reversed(dumps) if dump.header is not None and dump.header.tokens), dumps[1]), model
    )
    compared = compare_three(dumps, replace(options, truth=None if arbiter == OFF else known))
    if compared:
        return compared
    compared = replace(compared, notes=(*known.ignored, *compared.notes))
    if arbiter == OFF or known.truth is None:
        return compared
    return _in_its_arithmetic(with_truth(compared, dumps, known), dumps, options, model)


def _in_its_arithmetic(three_way: "ThreeWay", dumps: tuple[Dump, Dump, Dump], options: Options, model: Path) -> "ThreeWay":
    """The answer without blame of a side that does not say its arithmetic, where one that it may have explains its distance."""
    wrong = {side for point in three_way.points for side in point.wrong}
    right = [side for side in (1, 2, 0) if side not in wrong]
    notes, explained = list(three_way.notes), set[int]()
    for side in sorted(wrong) if right else ():
        header = dumps[side].header
        if header is not None and header.compute:
            continue
        verdict = compared_on(dumps[side], dumps[right[0]], options, model, third_side=False).verdict
        if verdict.precision is None or verdict.precision.arithmetic == "f32":
            continue
        if verdict or (verdict.pattern is not None and verdict.pattern.code in ("precision", "drift")):
            explained.add(side)
            arithmetic = ARITHMETIC[verdict.precision.arithmetic]
            notes.append(
                f"{three_way.sides[side]}: {arithmetic} arithmetic, which it does not state, may be its whole distance from float64"
            )
    points = tuple(
        replace(point, wrong=tuple(side for side in point.wrong if side not in explained)) for point in three_way.points
    )
    first = next((point for point in points if point.differs), None)
    return replace(three_way, points=points, first=first, notes=tuple(notes))


def _compared(ours: Dump, ref: Dump, options: Options, known: KnownModel) -> Comparison:
    if options.tolerance is not None or options.limits is not None:
        return comparison(ours, ref, options)
    stated = (options.compute or (ours.header.compute if ours.header is not None else "")).lower()
    if stated not in ("", "f32") and (measured := known.limits(ours, stated)) is not None:
        from .rounding.amplified import compared_by_cost
        from .rounding.not_as_stated import unless_in_float32
        from .rounding.own_rounding import beside_own_run

        by_cost = compared_by_cost(ours, ref, replace(options, limits=measured), known, stated)
        compared = beside_own_run(by_cost, ours, known, stated)
        return unless_in_float32(compared, ours, ref, options, known, stated)
    if stated or common_mode(ours.header, ref.header) == NATIVE:
        return comparison(ours, ref, options)
    from .rounding.arithmetic import of_unknown_arithmetic

    return _unless_weights(of_unknown_arithmetic(ours, ref, options, known), ours, known)


def _unless_weights(compared: Comparison, ours: Dump, known: KnownModel) -> Comparison:
    """A divergence that follows no law, which blames no operation if weights kept in a lower type give every record."""
    from ..diff.verdict.beyond_noise import ONE_FACTOR
    from .rounding.of_no_size import ONE_NUMBER

    verdict = compared.verdict
    follows_a_law = verdict.pattern is not None and verdict.pattern.code in (ONE_FACTOR, ONE_NUMBER)
    if verdict or follows_a_law or (case := known.beside_ours(ours, compared)) is None:
        return compared
    from .rounding.rounded_weights import in_kept_weights

    if not (sentence := in_kept_weights(case, _FOR_WEIGHTS)):
        return compared
    return replace(compared, verdict=replace(verdict, pattern=Pattern("undecided", sentence), operation=""))


def _as_seen(ref: Dump, ours: Dump) -> Dump:
    """The reference with no more leading values than ours: the cost of an arithmetic is measured on the values that are compared."""
    recorded = ours.points
    return replace(
        ref, points={name: as_wide(rows, recorded[name]) if name in recorded else rows for name, rows in ref.points.items()}
    )
