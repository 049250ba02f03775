"""What explains the first divergence: the last agreement, the operation or what to record next, and the pattern."""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.answers.diff import Agreement, Difference, Pattern, Seen
from checkpoints.points import EMBD, in_vocabulary
from checkpoints.record import Rows
from reports.sentences import GROWN

from ..limits import EXACT_FLOOR, FUTURE_MASS, JUMP, LARGEST_ROUNDING
from ..measured.dataflow import Stretch
from ..measured.operations import BEHIND, ELEMENTWISE, FAR, NEAR, SOME, noun
from ..measured.records import Records
from ..readings.readings import LAYOUT, Allowed, Others, common_length, head_size_of
from ..readings.rounding import cut_to, rounded_to
from ..readings.same_vector import SameVector, same_vector
from ..readings.shown import shown_by
from ..readings.wrong_values import scaled_part, summand
from .law_of_values import law_of_values, most_are_right
from .next_points import next_points, points_value
from .pattern import Evidence, diagnose

Ints = NDArray[np.int64]
BLAMED = "this operation is wrong"  # the end of a sentence that names an operation
_EARLY = "before-rope"  # the code of a pattern that a wrong rotation makes, and a record of what is not yet rotated

# If passing positions have an error within this factor of the failing ones', it is the same error at all of them.
_ALIKE = 30.0
# The same where the limit is measured, itself thirty times a mean cost: rounding of whole rows of one product differs by 3.2 times at most
# between positions (`scatter.SIMILAR`). One of seven positions 28 times as wrong as the others is no error of one size.
_ALIKE_MEASURED = 4.0


# NMSE: a row that has nothing to do with the reference's is off by the energy of both, so by 1 and more; half of that allows for what a few
# recorded elements have in common by chance.
UNRELATED = 0.5


class First(Struct, frozen=True):
    """Everything that a verdict says about the first divergence."""

    divergence: Difference
    agreement: Agreement | None
    next: str
    next_slice: int | None
    operation: str
    pattern: Pattern | None


def explain_first(records: Records, first: int, seen: Sequence[Seen]) -> First:
    """The explanation of record `first`, the first one of the first point of origin."""
    name = records.names[records.point[first]]
    divergence = records.difference(first)
    agreement = _last_agreement(records, first)
    stretch = records.flow.between(name)
    twin = same_vector(records, first)
    unseen = _unseen(records, first, stretch, seen)
    settled = stretch is not None and not stretch.unrecorded and not _of_places(records, name, stretch)
    advice = next_points(name, agreement.checkpoint if agreement else None, stretch, records.names)
    wider: int | None = None
    operation = ""
    if settled and stretch is not None and unseen and not (twin is not None and twin.idle):
        parents = [parent for item in unseen for parent in records.flow.parents[item.checkpoint]]
        advice = points_value(sorted({*parents, *stretch.inputs, name}, key=records.names.index))
        every = [item.of for item in (*unseen, *(item for item in seen if item.checkpoint == name)) if item.of is not None]
        wider = max(every, default=None)
        operation = _not_seen(name, unseen) + _others_differ(records, first, unseen)
    elif name in records.unconfirmed:
        readers = records.flow.of_readers.children[name][:3]
        operation = (
            f"{name} differs, but {' and '.join(readers)}, computed from it, "
            f"{'agrees' if len(readers) == 1 else 'agree'}: the record has another layout, "
            "moment or name, or later operations hide the error (a norm, a bound, a softmax dominated by one key, experts that "
            "were not chosen)"
        )
    elif settled and stretch is not None and not divergence.fresh and stretch.inputs:
        lower = records.limits.operations > EXACT_FLOOR.operations
        grown = GROWN if lower else "from below the limit: what is wrong lies before, or is small"
        operation = f"{name}: its error grew from that of {' and '.join(stretch.inputs)} without a jump, {grown}"
        advice = "" if lower else _towards_the_jump(records, first)
    elif settled and stretch is not None:
        later = twin.later if twin is not None else ""
        operation = (
            f"{name} shows {later}, which is computed later: its own value was not seen" if later else _operation(name, stretch)
        )
    pattern = _pattern(records, first, stretch, settled and not unseen and name not in records.unconfirmed, twin)
    looked_up = stretch is not None and not stretch.inputs
    if pattern is not None and (
        pattern.code == "reference-nonfinite" or (pattern.code in ("rounded", "tokens-shifted") and looked_up)
    ):
        operation = ""  # a table that is stored in a lower type, or another token, is neither another table nor another row
    if pattern is not None and pattern.code == _EARLY and operation.endswith(BLAMED):
        operation += ", or it was recorded before RoPE, and what is computed from it is wrong"
    return First(divergence, agreement, advice, wider, operation, pattern)


def _of_places(records: Records, name: str, stretch: Stretch) -> bool:
    """Whether only places in a file say what a point is made from: it or what stands before it is no point of the vocabulary."""
    return not records.flow.known and not all(map(in_vocabulary, (name, *stretch.inputs)))


def _towards_the_jump(records: Records, first: int) -> str:
    """The points to record before the last one at which the error of record `first`, which it inherits, jumped; empty if all are."""
    above = records.flow.ancestors(records.names[records.point[first]])
    here = (records.seq == records.seq[first]) & (records.token_idx <= records.token_idx[first]) & ~records.otherwise
    jumped = here & (records.jump() > JUMP) & (records.measures.nmse * JUMP >= records.measures.nmse[first])
    for at in np.flatnonzero(jumped)[::-1].tolist():
        name = records.names[records.point[at]]
        if name in above:
            before = _last_agreement(records, at)
            return next_points(name, before.checkpoint if before else None, records.flow.between(name), records.names)
    return ""


def _operation(name: str, stretch: Stretch) -> str:
    if not stretch.inputs:
        return f"{name} is looked up by token: the table or the row is wrong"
    agree = "which agrees" if len(stretch.inputs) == 1 else "which agree"
    return f"{name} is computed from {' and '.join(stretch.inputs)}, {agree}: {BLAMED}"


def _not_seen(name: str, unseen: Sequence[Seen]) -> str:
    what = " and ".join(
        f"{item.values} of {item.of:,} values of {item.checkpoint}" if item.of else f"{item.values} values of {item.checkpoint}"
        for item in unseen[:3]
    )
    return f"{name}, or one of its inputs: only {what} were recorded, and these agree"


def _others_differ(records: Records, first: int, unseen: Sequence[Seen]) -> str:
    """A remark if all else that is made from the one input that was seen in part, and was compared there, differs as well; else ""."""
    if len(unseen) > 1:
        return ""
    name, source = records.names[records.point[first]], unseen[0].checkpoint
    here = (records.seq == records.seq[first]) & (records.token_idx == records.token_idx[first])
    compared = {records.names[number] for number in records.point[here & records.trusted]}
    # A sum with a long residual stream may hide in it what its other summand has.
    others = [child for child in records.flow.children[source] if child != name and records.flow.mixes(source, child)]
    others = [child for child in others if child in compared]
    wrong = {records.names[number] for number in records.point[here & records.failed & ~records.upstream.failed]}
    if not others or not wrong.issuperset(others):
        return ""
    differ = "differ" if len(others) > 1 else "differs"
    return f"; {' and '.join(others[:3])}, computed from it, {differ}, too: the rest of {source}, or one fault in all of them"


def _unseen(records: Records, first: int, stretch: Stretch | None, seen: Sequence[Seen]) -> list[Seen]:
    """The inputs that were seen to agree only in part, if that leaves open whether the operation is wrong."""
    if stretch is None:
        return []
    if records.flow.operations(stretch.nodes) <= ELEMENTWISE and records.measures.nmse_slice[first] > records.limit[first]:
        return []  # wrong elements are made from the same elements of the inputs, which were seen
    by_name = {item.checkpoint: item for item in seen}
    return [by_name[name] for name in stretch.inputs if not by_name[name].whole and not _seen_by_others(records, first, name)]


def _seen_by_others(records: Records, first: int, name: str) -> bool:
    """Whether another point agrees at that position, each element of which is made from the whole row of `name`."""
    seq, position = records.seq[first], records.token_idx[first]
    wrong = records.names[records.point[first]]
    for child in records.flow.children[name]:
        if child == wrong or not records.flow.mixes(name, child):
            continue
        here = (records.point == records.names.index(child)) & (records.seq == seq) & (records.token_idx == position)
        if here.any() and not (records.failed | ~records.trusted)[here].any():
            return True
    return False


def _last_agreement(records: Records, first: int) -> Agreement | None:
    """The last point above the first divergence; nothing above fails at positions up to it, or it would not be the first."""
    name, position = records.names[records.point[first]], records.token_idx[first]
    above = records.flow.ancestors(name)
    for number in range(int(records.point[first]) - 1, -1, -1):
        if records.names[number] not in above:
            continue
        here = (records.point == number) & (records.seq == records.seq[first])
        reach = here & (records.token_idx <= position)
        if reach.any() and not records.otherwise[reach].any():
            whole = not (records.failed | records.otherwise)[here].any()
            return Agreement(records.names[number], int((here if whole else reach).sum()), whole)
    return None


def _pattern(records: Records, first: int, stretch: Stretch | None, settled: bool, twin: SameVector | None) -> Pattern | None:
    """The pattern that the point's values show, otherwise the pattern of the positions at which it is wrong."""
    if twin is not None:
        operation = noun(records.flow, stretch, twin.input) if stretch is not None else ""
        return Pattern("no-op" if twin.idle else "same-vector", twin.sentence(operation))
    here = np.flatnonzero(
        (records.point == records.point[first]) & (records.seq == records.seq[first]) & ~records.upstream.failed
    )
    failing = here[records.failed[here]]
    pair = records.pairs[records.point[first]]
    ours, ref = (side.take(records.row[failing]) for side in (pair.ours, pair.ref))
    zero = len(failing) > 0 and not ours.values.any() and bool(ref.values.any(axis=1).all())
    if (pattern := _of_values(records, failing, ours, ref, stretch, zero=zero)) is not None:
        return pattern
    measures = records.measures
    return diagnose(
        Evidence(
            point=pair.point,
            flow=records.flow,
            stretch=stretch,
            position=records.token_idx[here],
            failed=records.failed[here],
            step=records.step[here],
            decode=records.decode[here],
            nonfinite=bool(np.any(measures.nonfinite_ours[failing] > measures.nonfinite_ref[failing])),
            reference_broken=_reference_broken(records, failing),
            leak=bool(np.any(measures.future_mass[failing] > FUTURE_MASS)),
            drifted=not records.fresh()[failing].any(),
            settled=settled,
            embedded=EMBD in records.names,
            token=records.text_of(pair.point, int(records.token_idx[first])),
            alike=_alike(records, here, failing),
            gradual=_gradual(records, here),
            zero=zero,
            stated=records.stated,
            law=law_of_values(records, failing) if settled else "",
            differs=_how_far(records, failing),
            unclear=_unclear(records, here, failing),
        )
    )


def _how_far(records: Records, failing: Ints) -> str:
    """How the rows of these records differ: as far as unrelated ones, less, in some elements, or only behind the recorded ones."""
    recorded, whole = records.measures.nmse_slice[failing], records.measures.nmse[failing]
    if ((recorded <= records.limit[failing]) & (recorded * _ALIKE < whole)).all():
        return BEHIND
    if (whole < UNRELATED).all():
        return NEAR
    return SOME if most_are_right(records, failing) else FAR


def _unclear(records: Records, here: Ints, failing: Ints) -> bool:
    """Whether a position within the limit may have the failing ones' error, too, as where a summand is small beside a larger row."""
    errors = records.measures.nmse
    return bool((errors[np.setdiff1d(here, failing)] * _ALIKE >= np.median(errors[failing])).any())


def _of_values(
    records: Records, failing: Ints, ours: Rows, ref: Rows, stretch: Stretch | None, *, zero: bool
) -> Pattern | None:
    """The pattern of values that are the reference's in another type, layout or place; None if they are not. `zero`: they are all 0."""
    name = ref.point
    if type_name := rounded_to(ours, ref):
        return Pattern(
            "rounded",
            f"{name} is the reference's rounded to {type_name}: it is stored or computed in that type (--compute {_COMPUTE[type_name]})",
        )
    if type_name := cut_to(ours, ref):
        return Pattern(
            "rounded",
            f"{name} is the reference's with the digits beyond {type_name} cut off, not rounded: it is stored or computed in that type "
            f"(--compute {_COMPUTE[type_name.split(' ')[0]]})",
        )
    allowed = Allowed.of(records.limit[failing], records.measures.nmse[failing], ours, ref)
    others = Others(records.ref.points, rotated=records.flow.may_rotate)
    layout = shown_by(ours, ref, allowed, others, head_size_of(records.ref, records.ours))
    after = " and ".join(child for child in records.flow.children[name] if _differs(records, child, failing))
    if layout is not None and layout.relation in _SHIFTED and stretch is not None and not stretch.inputs and after:
        sentence = f"{name}: position t holds the reference's {layout.relation}, and what follows is computed from that"
        return Pattern("tokens-shifted", f"{sentence}: {_SHIFTED[layout.relation]}")
    if layout is not None and not (zero and after):  # zeros that are used were computed
        too = f"; {after} computed from it {'differ' if ' and ' in after else 'differs'}, too" if after else ""
        code = "order" if layout.kind == LAYOUT else _EARLY if layout.weak and not _refuted(records, name) else "other-record"
        return Pattern(code, f"{name}: {layout.sentence}{too}")
    if constant := summand(ours, ref, allowed):
        return Pattern("summand", f"{name}: {constant}: a bias, or an addition that is missing or too many")
    if name in records.unconfirmed and (part := scaled_part(ours, ref, allowed)):
        return Pattern("other-record", f"{name}: {part}: a fault whose effect a norm removes, or another moment")
    return None


def _refuted(records: Records, name: str) -> bool:
    """Whether the reference recorded what RoPE reads there: rows of an earlier moment would have been recognised as those."""
    read = records.flow.whole.computations[name].reads if name in records.flow.whole.computations else ()
    sizes = [
        common_length(records.ref.points[point], records.ref.points[name]) for point in read if point in records.ref.points
    ]
    return any(size is not None for size in sizes)


def _reference_broken(records: Records, failing: Ints) -> bool:
    """Whether all failing values are NaN or infinite only in the reference, or NaN in both."""
    measures = records.measures
    broken_ref = measures.nonfinite_ref[failing] > 0
    return bool((broken_ref & (measures.nonfinite_ours[failing] <= measures.nonfinite_ref[failing])).all()) and bool(
        np.isinf(measures.nmse[failing]).all()
    )


def _differs(records: Records, name: str, like: Ints) -> bool:
    """Whether records of a point fail at the positions of others."""
    here = (records.point == records.names.index(name)) & np.isin(records.token_idx, records.token_idx[like])
    return bool((here & records.failed).any())


# An edge (a window's, the cache's, RoPE's) separates right positions from wrong ones: the right ones have noise, 1e-12 or so, the wrong
# ones an error beyond the limit of 1e-10. An error that grows from position to position has less than this factor between two neighbours.
_EDGE = 30.0
_SHIFTED = {
    "t − 1": "is the first token, BOS, there twice, or is there a slot in front of it?",
    "t + 1": "is the first token, BOS, missing?",
}
_COMPUTE = {"F16 or TF32": "f16", "F16": "f16", "BF16": "bf16", "TF32": "tf32", "8 bits per block": "q8"}


def _gradual(records: Records, here: Ints) -> bool:
    """Whether the error gradually grows over the limit: the last position that passes before the first that fails is nearly as wrong."""
    errors, failed = records.measures.nmse[here], records.failed[here]
    at = int(failed.argmax())
    return at > 0 and not failed[:at].any() and bool(errors[at] <= _EDGE * errors[:at].max())


def _alike(records: Records, here: Ints, failing: Ints) -> bool:
    """Whether passing positions have an error of the same size as failing ones, all of them as small as rounding."""
    right = np.setdiff1d(here, failing)
    errors = records.measures.nmse
    measured = bool(records.limits.points)  # costs of an arithmetic
    if len(right) < 2 or not (records.limits.assumed or measured) or float(errors[failing].max()) > LARGEST_ROUNDING:
        return False
    times = _ALIKE_MEASURED if measured else _ALIKE
    return float(np.median(errors[right])) * times >= float(np.median(errors[failing]))
