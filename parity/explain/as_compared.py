"""What `parity diff` holds against a dump in which no fault was found, so that the two commands do not contradict each other.

`explain` knows an arithmetic by the sizes of its errors; `diff` also asks for what such noise never has, a factor of all positions, say.
"""

from contextlib import suppress

from msgspec.structs import replace

from checkpoints.answers.diff import AGREES, Verdict
from checkpoints.answers.explain import DivergentPlace, Explanation
from checkpoints.errors import ParityError
from checkpoints.record import Dump
from reports.sentences import ARITHMETIC

from ..diff.compare import Comparison, Options
from ..diff.limits import EXACT_FLOOR, NATIVE
from ..diff.readings.layouts import is_rotated
from ..diff.verdict.beyond_noise import ONE_FACTOR
from ..diff.verdict.undecided import FEW_POSITIONS
from ..laws.laws import NOT_RECORDED
from ..run.graphs import dataflow_of
from .budget import Budget
from .case import Case, ExplainOptions
from .on_model import compared_on
from .records.records import right_rows
from .rounding.looks_like import reproducing
from .rounding.mixed import noise_in_words
from .rounding.not_as_stated import CONTRADICTED
from .rounding.precision import KINDS
from .rounding.single_rows import with_single_rows
from .search.state import SearchState

_LAWS = (ONE_FACTOR, "own-rounding")  # codes of patterns that say how the recorded elements come from the right ones
_OPEN = ("undecided", "drift")  # that do not say whether a fault or another arithmetic made them


def as_diff_says(case: Case, answer: Explanation, options: ExplainOptions) -> Explanation:
    """The answer that there is no fault, unless a comparison with the right engine's records ends in a divergence, or cannot judge them.

    An answer without a finding gets the place of that divergence where its own agrees in the arithmetic that the dump states, and is left
    open where the comparison leaves open whether a fault or another arithmetic made that place.
    """
    noisy = any(bool((entry.base > EXACT_FLOOR.operations).any()) for entry in case.entries)
    known = case.dump.header
    if not noisy or (known is not None and known.mode == NATIVE) or not (answer or _nothing_found(case, answer)):
        return answer
    compared = beside_right(case, options)
    if not answer and not (_in_stated_noise(case, answer, options) and _agrees(compared.verdict, answer)):
        return left_open_by(compared.verdict, answer)
    if compared.verdict.unjudged.result:
        return replace(answer, unjudged=compared.verdict.unjudged.points, next="")
    first, pattern = compared.verdict.first_divergence, compared.verdict.pattern
    follows_a_law = pattern is not None and pattern.code in _LAWS
    # Our own run with what an engine rounds besides (its biases, say), which diff does not try, may have the dump's every record.
    if first is None or (answer and not follows_a_law and reproducing(with_single_rows(case), Budget(options.budget)).is_noise):
        return answer
    if pattern is not None and pattern.code == "nonfinite":
        return answer  # F16 has no mask's -3e38: infinities that our own run in F16 makes, too, are excused
    place = DivergentPlace(first.checkpoint, first.token_idx, float("inf") if first.nmse is None else first.nmse, first.limit)
    agreed = compared.verdict.last_agreement
    law, left_open, note = _said(compared.verdict, first.checkpoint)
    return replace(
        answer,
        first=place,
        remaining=place,
        last_agreement=None if agreed is None else agreed.checkpoint,
        differing=int(compared.records.failed.sum()),
        law=law,
        rounds=False,
        left_open=left_open,
        placed=answer.placed if answer else None,
        notes=(*answer.notes, *note, *(note for note in compared.verdict.notes if note.startswith(CONTRADICTED))),
        next=compared.verdict.next,
        precision_only="",
        precision_alike=(),
        precision_assumed=False,
    )


def agrees_as_stated(case: Case, start: SearchState, options: ExplainOptions) -> bool:
    """Whether single records are over the limits of the stated arithmetic here, and none is where `parity diff` compares them with the
    right engine's: it measures the cost of whole rows, even where few values of them were recorded.
    """
    over = [int((nmse > entry.limit).sum()) for entry, nmse in zip(case.entries, start.nmse, strict=False)]
    single = all(number * FEW_POSITIONS <= len(entry.rows) for entry, number in zip(case.entries, over, strict=False))
    if start.first is None or not single or case.given or any(entry.lost.any() for entry in case.entries):
        return False
    verdict = beside_right(case, options).verdict
    return bool(verdict) and not verdict.unjudged


def beside_right(case: Case, options: ExplainOptions) -> Comparison:
    """What `parity diff` says of a case's records beside the right engine's."""
    known = case.dump.header
    ours = replace(case.dump, points={entry.point: case.dump.points[entry.point] for entry in case.entries})
    stated = known is not None and known.compute.lower() == options.compute
    return compared_on(
        ours,
        _right(case, ours),
        Options(compute=None if stated else options.compute, placed=True),
        case.transformer.model.path,
        options.arbiter,
        third_side=False,
        opened=case.transformer,
    )


def _nothing_found(case: Case, answer: Explanation) -> bool:
    """Whether nothing explains the first place that differs, and the arithmetic, which is not stated to be float32, may make it differ."""
    law = answer.law and answer.law not in map(noise_in_words, KINDS) and not answer.law.endswith(NOT_RECORDED)
    leads = any(lead.named is not None for lead in answer.leads)  # the others say which positions are wrong
    found = answer.causes or leads or law or answer.suspects
    return not case.states_f32 and answer.first is not None and not found


def _in_stated_noise(case: Case, answer: Explanation, options: ExplainOptions) -> bool:
    """Whether an answer that found nothing is about an arithmetic that the dump's header states."""
    stated = case.dump.header.compute if case.dump.header is not None else ""
    return options.compute is None and stated in KINDS and _nothing_found(case, answer)


def left_open_by(verdict: Verdict, answer: Explanation) -> Explanation:
    """An answer that found nothing, left open if a comparison leaves open whether a fault or another arithmetic made its first place."""
    first, pattern = verdict.first_divergence, verdict.pattern
    if answer.law and not answer.law.endswith(NOT_RECORDED):
        return answer  # it says by itself that this may be an arithmetic's noise
    if verdict and verdict.precision is not None and verdict.precision.arithmetic in KINDS:
        lower = ARITHMETIC[verdict.precision.arithmetic]
        sentence = (
            f"no more than {lower} arithmetic costs on this model, but not where our own rounding puts it: a fault, or an arithmetic that "
            "rounds in another way"
        )
        return replace(answer, law="", leads=(), placed=None, left_open=sentence)
    if first is None or answer.first is None or first.checkpoint != answer.first.checkpoint:
        return answer
    if pattern is None or pattern.code not in _OPEN:
        return answer
    return replace(answer, law="", leads=(), left_open=_said(verdict, first.checkpoint)[1])


def _agrees(verdict: Verdict, answer: Explanation) -> bool:
    """Whether the first place of an answer agrees by the limits of a comparison, and another does not."""
    here = (
        point.status for point in verdict.points if answer.first is not None and point.checkpoint == answer.first.checkpoint
    )
    return verdict.first_divergence is not None and AGREES in here


def _said(verdict: Verdict, point: str) -> tuple[str, str, tuple[str, ...]]:
    """What a divergence says of its first point: a law, or what it leaves open, or else a note."""
    if verdict.pattern is None:
        return "", "", ()
    code, sentence = verdict.pattern.code, verdict.pattern.sentence
    if code in _LAWS:
        return sentence.removeprefix(f"{point}: "), "", ()
    if code in _OPEN:
        return "", sentence.removeprefix(f"{point}: "), ()
    return "", "", (f"parity diff: {sentence}",)


def _right(case: Case, ours: Dump) -> Dump:
    """The right engine's records of the points of a dump, as a dump; whole ones where another order of elements is usual."""
    header = case.header()
    header = header if header.tokens else replace(header, tokens=case.tokens[: len(case.tokens) - len(ours.tokens)])
    with suppress(ParityError):  # llama.cpp has none of this model: the points' own order is used then
        header = replace(header, dataflow=dataflow_of(case.transformer.model.path).to_json())
    whole = [name for name in ours.points if is_rotated(name)]
    return Dump("our engine", header, right_rows(case.replay, case.positions, ours.points, whole), tokens=ours.tokens)
