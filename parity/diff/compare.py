"""Compares two dumps. `compare` answers, `measured` holds the numbers of every record."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.diff import Limits, Verdict
from checkpoints.errors import DumpError
from checkpoints.points import LOGITS, OUTPUT_NORM, parse
from checkpoints.record import Dump, Header

from .align import Pair, align
from .dataflow import upstream
from .judge import judge
from .limits import ASSUMED_JUMP, EXACT_FLOOR, common_mode, limits
from .metrics import Measures, measure
from .noise import excused
from .offsets import Placed, elsewhere, place
from .pass_sums import with_pass_sums
from .records import Records, picked, proportion
from .tokens import same_experiment, sequence, token_text


@dataclass(frozen=True)
class Options:
    """How to compare.

    `tolerance`: one NMSE limit for everything. `compute`: arithmetic of our side (f32, tf32, f16, bf16) where its header
    does not say it. `strict`: what one side lacks is a divergence. `step`: which of contradicting records of one key counts.
    `placed`: the caller says that our positions count as the reference's do; else they are looked for where nothing says it.
    `limits`: those to apply instead of the table's.
    """

    tolerance: float | None = None
    compute: str | None = None
    strict: bool = False
    step: int | None = None
    placed: bool = False
    limits: Limits | None = None


def compare(ours: Dump, ref: Dump, options: Options | None = None) -> Verdict:
    """Compare two dumps.

    Raises:
        InputError: two models or two prompts, or an unusable option.
        DumpError: nothing in common, records of one key that contradict each other, or no way to tell how our positions count.
    """
    return judge(measured(ours, ref, options))


def measured(ours: Dump, ref: Dump, options: Options | None = None) -> Records:
    """Align, measure and hold every record against its limit. Raises as `compare` does."""
    options = options or Options()
    allowed = options.limits or limits(ours.header, ref.header, compute=options.compute, tolerance=options.tolerance)
    same_experiment(ours, ref)
    placed = Placed(ours) if options.placed else place(ours, ref)
    ours = placed.ours
    tokens = sequence(ours, ref)
    alignment = align(ours, ref, options.step)
    pairs = alignment.pairs
    total = sum(len(pair.ours) for pair in pairs)
    if tokens.until is not None:
        pairs = picked(pairs, [pair.ref.token_idx < tokens.until for pair in pairs])
    kept = sum(len(pair.ours) for pair in pairs)
    measures = measure(pairs)
    known = measures.known()
    unusable: tuple[str, ...] = ()
    if not known.all():
        unusable = (f"{int((~known).sum())} records have no finite value in common and could not be compared",)
        pairs = picked(pairs, np.split(known, np.cumsum([len(pair.ours) for pair in pairs])[:-1]))
        measures = measure(pairs)
    measures = with_pass_sums(measures, pairs, ours, ref)
    if not len(measures) and tokens.divergence is None:
        raise DumpError(
            "no record could be compared.",
            f"{total - kept} records come after the place where the tokens part."
            if total > kept
            else "Record the same leading values on both sides.",
            code="nothing-in-common",
        )
    names = [pair.point for pair in pairs]
    point = np.repeat(np.arange(len(pairs)), [len(pair.ours) for pair in pairs])
    seq, token_idx = _column(pairs, "seq"), _column(pairs, "token_idx")
    limit = _limit_of_each(pairs, point, measures, allowed)
    of_limit = proportion(measures.nmse, measures.future_mass, limit)
    noise: tuple[str, ...] = ()
    if allowed.operations == EXACT_FLOOR.operations and options.tolerance is None:
        limit, noise = excused(names, point, seq, token_idx, measures.nmse, of_limit, limit)
        of_limit = proportion(measures.nmse, measures.future_mass, limit)
    failed = of_limit > 1
    right = np.bincount(point, weights=~failed, minlength=len(pairs))
    wrong = [pair.point for pair, agreeing in zip(pairs, right, strict=True) if not agreeing]
    return Records(
        ours=ours,
        ref=ref,
        pairs=pairs,
        point=point,
        row=np.concatenate([np.arange(len(pair.ours)) for pair in pairs]) if pairs else point,
        seq=seq,
        token_idx=token_idx,
        step=_column(pairs, "step"),
        decode=_column(pairs, "decode").astype(np.bool_),
        measures=measures,
        limit=limit,
        of_limit=of_limit,
        failed=failed,
        upstream=upstream(names, point, seq, token_idx, measures.nmse, failed),
        limits=allowed,
        mode=common_mode(ours.header, ref.header),
        tokens=tokens,
        text=token_text(ours, ref),
        missing_ours=alignment.missing_ours,
        missing_ref=alignment.missing_ref,
        left_out=total - kept,
        strict=options.strict,
        notes=(
            *((placed.note,) if placed.note else ()),
            *elsewhere(ours, ref, wrong),
            *alignment.notes,
            *unusable,
            *noise,
            *_notes(ours, ref, pairs, measures),
        ),
    )


def _column(pairs: tuple[Pair, ...], name: str) -> NDArray[np.int64]:
    columns = [getattr(pair.ours, name) for pair in pairs]
    return np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)


def _limit_of_each(
    pairs: tuple[Pair, ...], point: NDArray[np.int64], measures: Measures, allowed: Limits
) -> NDArray[np.float64]:
    """float64 [R]. Where the arithmetic is not known, the noise of the layers before sets the limit.

    A whole layer that agrees shows the engine's own noise; what jumps far above it later is no noise, however small it is
    against the loosest arithmetic. Before the first whole layer, and never above it, the loosest limit holds.
    """
    chosen = np.array(
        [allowed.points.get(pair.point, allowed.logits if pair.point == LOGITS else allowed.operations) for pair in pairs]
    )
    if allowed.assumed and len(measures):
        noise = 0.0
        starts = np.searchsorted(point, np.arange(len(pairs)))
        worst = np.maximum.reduceat(measures.nmse, starts)
        for number, pair in enumerate(pairs):
            if noise:
                floor = EXACT_FLOOR.logits if pair.point == LOGITS else EXACT_FLOOR.operations
                chosen[number] = min(chosen[number], max(floor, ASSUMED_JUMP * noise))
            if (parse(pair.point).kind == "l_out" or pair.point == OUTPUT_NORM) and worst[number] <= chosen[number]:
                noise = max(noise, float(worst[number]))
    return chosen[point] if len(point) else np.zeros(0)


def _notes(ours: Dump, ref: Dump, pairs: tuple[Pair, ...], measures: Measures) -> list[str]:
    notes = [f"{dump.path}: {note}" for dump in (ours, ref) for note in dump.notes]
    left, right = ours.header, ref.header
    if left is not None and right is not None:
        for what, a, b in _settings(left, right):
            if a and b and a != b:
                notes.append(f"{what}: ours {a}, the reference {b}")
    printed = [pair for pair in pairs if pair.ours.quantum is not None or pair.ref.quantum is not None]
    if printed:
        step = max(
            float(side.quantum.max(initial=0)) for pair in printed for side in (pair.ours, pair.ref) if side.quantum is not None
        )
        notes.append(f"values are printed in steps of up to {step:.0e}: what is smaller is not seen (%.9g shows all)")
    both = int(((measures.nonfinite_ours > 0) & (measures.nonfinite_ref > 0)).sum())
    if both:
        notes.append(f"{both} records have NaN or infinities on both sides: those elements are not compared")
    other = [pair.point for pair in pairs if _lengths(pair)]
    if other:
        notes.append(
            f"the rows differ in length at {', '.join(other[:3])}{', …' if len(other) > 3 else ''}: leading values are compared"
        )
    return notes


def _settings(left: Header, right: Header) -> list[tuple[str, str, str]]:
    # Fingerprints say it better, and a foreign engine may give its file's path (of the twin, say) for a name.
    named = not (left.model.fingerprint and right.model.fingerprint) and not left.model.name.endswith(".gguf")
    return [
        ("mode", left.mode, right.mode),
        ("KV type", left.kv_type, right.kv_type),
        *([("model", left.model.name, right.model.name)] if named else []),
        ("architecture", left.model.architecture, right.model.architecture),
        ("layers", str(left.model.layers or ""), str(right.model.layers or "")),
    ]


def _lengths(pair: Pair) -> bool:
    """Whether the statistics of a point tell of rows of another length."""
    a, b = pair.ours.stats.get("n"), pair.ref.stats.get("n")
    return a is not None and b is not None and bool(np.any((a != b) & ~np.isnan(a) & ~np.isnan(b)))
