"""The comparison of two dumps, stage by stage: tokens, offsets, align, measure, limits, consumers, judge.
Modules that only a difference needs are imported when there is one: most comparisons agree, and importing takes longer than comparing.
"""

from functools import cached_property

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import Limits, RecordFault, Verdict
from checkpoints.answers.picture import Picture
from checkpoints.printable import first_names
from checkpoints.record import Dump, Header, Rows

from .against_limits import Held, hold
from .align import Pair, align
from .dataflow import Flow, dataflow_of, flow, upstream, without_mask
from .judge import judge
from .limits import EXACT_FLOOR, NATIVE, common_mode, limits
from .masked_values import masked_as_ours
from .measure import Measured, Measures, measured
from .offsets import AlignedDump, elsewhere, place
from .picture import picture
from .records import Judged, Records
from .routing import Routed, as_sets, is_routing, routed
from .tokens import TokenComparison, compare_tokens, own_choice, same_experiment, token_text
from .truth import Truth
from .whole_rows import sizes


class Options(Struct, frozen=True):
    """How to compare.

    `tolerance`: one NMSE limit for everything. `compute`: the arithmetic of our side (f32, tf32, f16, bf16, q8), if its header
    does not state it. `strict`: a record that one side lacks is a divergence, and so is every record that differs, even if all that is
    computed from it agrees. `step`: the forward pass whose record is used if records of one key contradict each other.
    `placed`: the caller knows that both sides count positions alike; otherwise an offset is searched for unless something states it.
    `limits`: limits to apply instead of the table's. `truth`: provides the model's values in float64.
    """

    tolerance: float | None = None
    compute: str | None = None
    strict: bool = False
    step: int | None = None
    placed: bool = False
    limits: Limits | None = None
    truth: Truth | None = None


class Comparison(Struct, frozen=True, dict=True):
    """The result of a comparison: every record with its figures, and the answer.

    `truth` is the record that the answer is about, in float64, if that was computed.
    """

    records: Records
    verdict: Verdict
    truth: Rows | None = None

    @cached_property
    def picture(self) -> Picture:
        """What a report draws."""
        return picture(self.records, self.verdict, self.truth)


def compare(ours: Dump, ref: Dump, options: Options | None = None) -> Verdict:
    """The verdict of `comparison`, which documents the errors raised."""
    return comparison(ours, ref, options).verdict


def comparison(ours: Dump, ref: Dump, options: Options | None = None) -> Comparison:
    """Compare two dumps.

    An engine that chose other tokens than the reference is compared up to its first differing choice, which is then the divergence.

    Raises:
        InputError: two models or two prompts, or an unusable option.
        DumpError: nothing in common, contradicting records of one key, or no way to tell how our positions count.
    """
    options = options or Options()
    compared = _comparison(ours, ref, options)
    first, records = compared.verdict.first_divergence, compared.records
    parted = own_choice(first, records.ours, ref)
    before = first is not None and bool((records.token_idx < first.token_idx).any())
    if parted is not None and before:
        return _comparison(ours, ref, options, parted)
    if first is None and options.tolerance is None and (records.measures.nmse > EXACT_FLOOR.operations).any():
        from .beyond_noise import held_to_noise

        records, verdict = held_to_noise(records, compared.verdict, options.truth)
        return replace(compared, records=records, verdict=verdict)
    if first is None or options.strict or options.limits is not None:
        return compared
    from .eight_bits import looks_like_eight_bits, suspicion

    if looks_like_eight_bits(records):
        return replace(compared, verdict=suspicion(compared.verdict))
    if options.tolerance is not None or options.truth is not None:
        return compared
    from .undecided import undecided

    return replace(compared, verdict=undecided(records, compared.verdict))


def _comparison(ours: Dump, ref: Dump, options: Options, parted: TokenComparison | None = None) -> Comparison:
    allowed = options.limits or limits(ours.header, ref.header, compute=options.compute, tolerance=options.tolerance)
    same_experiment(ours, ref)
    placed = AlignedDump(ours) if options.placed else place(ours, ref)
    ours = placed.ours
    tokens = parted or compare_tokens(ours, ref)
    whole, damaged = dataflow_of(ours, ref)
    alignment = align(ours, ref, options.step, tokens, whole)
    if allowed.operations > EXACT_FLOOR.operations:
        alignment = replace(alignment, pairs=masked_as_ours(alignment.pairs))
    errors = as_sets(measured(alignment, ours, ref))
    unmasked = without_mask(ref.points)  # ours may lack a mask by mistake, or record masked columns
    unmasked = without_mask(ours.points) if unmasked is None else unmasked
    layers = _layers(ref) or _layers(ours)
    model = flow(errors.names, whole, layers, unmasked=bool(unmasked))
    lower = (
        (options.limits is None or allowed.assumed)
        and common_mode(ours.header, ref.header) != NATIVE
        and allowed.operations > EXACT_FLOOR.operations
    )
    lower = lower and not options.strict and options.tolerance is None
    held, routing = _held(errors, allowed, model, options, ref, lower=lower)
    verdicts = Judged(np.zeros(len(errors.point), dtype=np.bool_))
    if held.failed.any() and not options.strict:
        from .consumers import judged

        verdicts = judged(errors, held, model, ours, ref)
        shown: tuple[RecordFault, ...] = ()
        while verdicts.blind and len(verdicts.blind) < len(errors.pairs):
            # What these points hold is not known: they are left out, as if they had not been recorded.
            shown = tuple(fault for fault in verdicts.faults if fault.checkpoint in verdicts.blind or fault in shown)
            errors = errors.without(verdicts.blind)
            model = flow(errors.names, whole, layers, unmasked=bool(unmasked))
            held, routing = _held(errors, allowed, model, options, ref, lower=lower)
            verdicts = judged(errors, held, model, ours, ref, shown, verdicts.elsewhere)
    if verdicts.share is not None:
        held = held.with_noise(verdicts.share)
    failed = held.failed & ~verdicts.otherwise
    trusted = np.where(verdicts.otherwise | routing.open, 0.0, errors.measures.nmse)
    agreeing = np.bincount(errors.point, weights=~failed, minlength=len(errors.pairs))
    wrong = [pair.point for pair, right in zip(errors.pairs, agreeing, strict=True) if not right]
    records = Records(
        ours=ours,
        ref=ref,
        pairs=errors.pairs,
        point=errors.point,
        row=errors.row,
        seq=errors.seq,
        token_idx=errors.token_idx,
        step=errors.step,
        decode=errors.decode,
        measures=errors.measures,
        limit=held.limit,
        of_limit=held.of_limit,
        failed=failed,
        otherwise=verdicts.otherwise,
        open=routing.open,
        record_faults=verdicts.faults,
        undecided=verdicts.undecided,
        upstream=upstream(model, errors.point, errors.seq, errors.token_idx, trusted, failed),
        flow=model,
        limits=allowed,
        mode=common_mode(ours.header, ref.header),
        tokens=tokens,
        text=token_text(ours, ref),
        missing_ours=alignment.missing_ours,
        missing_ref=alignment.missing_ref,
        uncompared=alignment.uncompared,
        left_out=alignment.left_out,
        strict=options.strict,
        stated=(options.compute or (ours.header.compute if ours.header is not None else "")).lower(),
        excused=held.excused,
        notes=(
            *((placed.note,) if placed.note else ()),
            *elsewhere(ours, ref, wrong),
            *damaged,
            *alignment.notes,
            *errors.notes,
            *held.notes,
            *_notes(ours, ref, errors.pairs, errors.measures),
        ),
    )
    return Comparison(records, judge(records))


def _held(errors: Measured, allowed: Limits, model: Flow, options: Options, ref: Dump, *, lower: bool) -> tuple[Held, Routed]:
    """The errors compared with their limits, without records that other experts than the reference's computed."""
    held = hold(errors, allowed, model, excuse_noise=options.tolerance is None, truth=options.truth, lower_arithmetic=lower)
    routing = routed(errors, held, model, ref.points)
    return replace(held, failed=held.failed & ~routing.open, notes=(*held.notes, *routing.notes)), routing


def _printed_steps(pairs: tuple[Pair, ...]) -> NDArray[np.float64]:
    """The widest step of the printed digits of either side, by record: 0 where both give every float32, and for ids of experts.

    A step below that from one float32 to the next hides nothing: in a row of two values, `%.9g` may print both with nine decimals.
    """
    steps = [np.zeros(len(pair.ours)) for pair in pairs]
    for pair, step in zip(pairs, steps, strict=True):
        for side in (pair.ours, pair.ref):
            if side.quantum is not None and not is_routing(pair):
                with np.errstate(invalid="ignore"):
                    hidden = np.where(side.quantum > np.spacing(np.abs(side.values)), side.quantum, 0.0)
                np.maximum(step, hidden.max(axis=1, initial=0.0), out=step)
    return np.concatenate(steps) if steps else np.zeros(0)


def _layers(dump: Dump) -> int | None:
    return dump.header.model.layers if dump.header is not None else None


def _notes(ours: Dump, ref: Dump, pairs: tuple[Pair, ...], measures: Measures) -> list[str]:
    notes = [f"{dump.path}: {note}" for dump in (ours, ref) for note in dump.notes]
    left, right = ours.header, ref.header
    if left is not None and right is not None:
        for what, a, b in _settings(left, right):
            if a and b and a != b:
                looser = "; the looser limits, those of native mode, apply" if what == "mode" else ""
                notes.append(f"{what}: ours {a}, the reference {b}{looser}")
    printed = _printed_steps(pairs)
    if printed.any():
        records = "" if printed.all() else f"{np.count_nonzero(printed):,} of {len(printed):,} records' "
        notes.append(
            f"{records}values are printed in steps of up to {printed.max():.0e}: smaller differences cannot be seen there"
            " (%.9g prints all digits)"
        )
    both = np.flatnonzero((measures.nonfinite_ours > 0) & (measures.nonfinite_ref > 0))
    if len(both):
        ends = np.cumsum([len(pair.ours) for pair in pairs])
        first = pairs[int(np.searchsorted(ends, both[0], side="right"))].point
        notes.append(
            f"NaN or infinities on both sides in {len(both)} records, the first at {first}: those elements are not compared"
        )
    other = [pair.point for pair in pairs if _lengths(pair)]
    if other:
        notes.append(f"the rows differ in length at {first_names(other, 3)}: leading values are compared")
    return notes


def _settings(left: Header, right: Header) -> list[tuple[str, str, str]]:
    # Fingerprints are more reliable, and a foreign side may give its file's path (the twin's, for instance) as the name.
    paths = any(header.model.name.endswith(".gguf") for header in (left, right))
    named = not (left.model.fingerprint and right.model.fingerprint) and not paths
    return [
        ("mode", left.mode, right.mode),
        ("KV type", left.kv_type, right.kv_type),
        *([("model", left.model.name, right.model.name)] if named else []),
        ("architecture", left.model.architecture, right.model.architecture),
        ("layers", str(left.model.layers or ""), str(right.model.layers or "")),
    ]


def _lengths(pair: Pair) -> bool:
    """Whether the sides state different lengths for a point's rows."""
    a, b = sizes(pair.ours), sizes(pair.ref)
    return bool(np.any((a != b) & ~np.isnan(a) & ~np.isnan(b)))
