"""The comparison of two dumps, stage by stage: tokens, offsets, align, measure, limits, consumers, judge.
Modules that only a difference needs are imported when there is one: most comparisons agree, and importing takes longer than comparing.
"""

from functools import cached_property

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.diff import Limits, RecordFault, Verdict
from checkpoints.answers.picture import Picture
from checkpoints.dataflow import Dataflow
from checkpoints.record import Dump, Rows

from .limits import EXACT_FLOOR, NATIVE, common_mode, limits
from .measured.align import align
from .measured.dataflow import Flow, dataflow_of, flow, without_mask
from .measured.masked_values import masked_as_ours
from .measured.measure import Measured, measured
from .measured.offsets import AlignedDump, elsewhere, place
from .measured.records import Judged, Records
from .measured.tokens import TokenComparison, compare_tokens, own_choice, same_experiment, token_text
from .readings.routing import Routed, as_sets, routed
from .tolerances.against_limits import Held, hold
from .tolerances.truth import Truth
from .verdict.judge import judge
from .verdict.notes import notes_on
from .verdict.picture import picture


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
    if first is None:
        return _beyond_noise(compared, options)
    parted = own_choice(first, records.ours, ref)
    if parted is not None and (records.token_idx < first.token_idx).any():
        return _comparison(ours, ref, options, parted)
    return _doubted(compared, options)


def _beyond_noise(compared: Comparison, options: Options) -> Comparison:
    """Sides that agree within their limits: a divergence after all if their errors have what noise has not."""
    if options.tolerance is not None or not (compared.records.measures.nmse > EXACT_FLOOR.operations).any():
        return compared
    from .verdict.beyond_noise import held_to_noise

    records, verdict = held_to_noise(compared.records, compared.verdict, options.truth)
    return replace(compared, records=records, verdict=verdict)


def _doubted(compared: Comparison, options: Options) -> Comparison:
    """A divergence, which blames no operation where the table's limits cannot tell a fault from rounding."""
    if options.strict:
        return compared
    if options.limits is not None:
        from .verdict.undecided import by_other_experts

        return replace(compared, verdict=by_other_experts(compared.records, compared.verdict))
    from .verdict.eight_bits import looks_like_eight_bits, suspicion

    if looks_like_eight_bits(compared.records):
        return replace(compared, verdict=suspicion(compared.verdict))
    if options.tolerance is not None or options.truth is not None:
        return compared
    from .verdict.undecided import undecided

    return replace(compared, verdict=undecided(compared.records, compared.verdict))


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
    against = _Against(ours, ref, allowed, options, whole)
    errors, model, held, routing, verdicts = against.judged(errors)
    failed = held.failed & ~verdicts.otherwise
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
        unconfirmed=verdicts.unconfirmed,
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
            *notes_on(ours, ref, errors.pairs, errors.measures),
        ),
    )
    return Comparison(records, judge(records))


class _Against(Struct, frozen=True):
    """What errors are held against: limits, the model's dataflow (`whole`, if a dump says it), what is made from each point."""

    ours: Dump
    ref: Dump
    allowed: Limits
    options: Options
    whole: Dataflow | None

    def judged(self, errors: Measured) -> tuple[Measured, Flow, Held, Routed, Judged]:
        """The errors, compared with their limits, and what is made from failing points says of these."""
        model, held, routing = self._held(errors)
        if self.options.strict or not held.failed.any():
            return errors, model, held, routing, Judged(np.zeros(len(errors.point), dtype=np.bool_))
        from .readings.consumers import judged

        verdicts = judged(errors, held, model, self.ours, self.ref)
        shown: tuple[RecordFault, ...] = ()
        while verdicts.blind and len(verdicts.blind) < len(errors.pairs):
            # What these points hold is not known: they are left out, as if they had not been recorded.
            shown = tuple(fault for fault in verdicts.faults if fault.checkpoint in verdicts.blind or fault in shown)
            errors = errors.without(verdicts.blind)
            model, held, routing = self._held(errors)
            verdicts = judged(errors, held, model, self.ours, self.ref, shown, verdicts.elsewhere)
        if verdicts.share is not None:
            held = held.with_noise(verdicts.share)
        return errors, model, held, routing, verdicts

    def _held(self, errors: Measured) -> tuple[Flow, Held, Routed]:
        """The errors compared with their limits, without records that other experts than the reference's computed."""
        ours, ref, options = self.ours, self.ref, self.options
        unmasked = without_mask(ref.points)  # ours may lack a mask by mistake, or record masked columns
        unmasked = without_mask(ours.points) if unmasked is None else unmasked
        model = flow(errors.names, self.whole, _layers(ref) or _layers(ours), unmasked=bool(unmasked))
        noise = options.tolerance is None
        held = hold(
            errors, self.allowed, model, excuse_noise=noise, truth=options.truth, lower_arithmetic=self._lower_arithmetic()
        )
        routing = routed(errors, held, model, ref.points)
        return model, replace(held, failed=held.failed & ~routing.open, notes=(*held.notes, *routing.notes)), routing

    def _lower_arithmetic(self) -> bool:
        """Whether the limits are the table's for an arithmetic below float32, in exact mode."""
        options, allowed = self.options, self.allowed
        of_the_table = options.limits is None or allowed.assumed
        lower = common_mode(self.ours.header, self.ref.header) != NATIVE and allowed.operations > EXACT_FLOOR.operations
        return of_the_table and lower and not options.strict and options.tolerance is None


def _layers(dump: Dump) -> int | None:
    return dump.header.model.layers if dump.header is not None else None
