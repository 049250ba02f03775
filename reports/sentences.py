"""A verdict in sentences: what the terminal, the HTML report and Markdown say alike. Text from dumps is cleaned, not escaped."""

from collections.abc import Iterator

from checkpoints.answers.diff import DIVERGENCE, Difference, Missing, Verdict
from checkpoints.points import EMBD, parse

from .numbers import clean, count, limit, ranges, token


def headline(verdict: Verdict) -> str:
    """Where the sides part, or that they don't, in one line."""
    first = verdict.first_divergence
    if first is not None:
        return f"divergence at {place(first)}"
    return "parity" if verdict else f"{DIVERGENCE}: records are missing"


def place(found: Difference) -> str:
    """ "blk.5.l_out, position 1 " upon""."""
    where = f"position {found.token_idx} {token(found.token)}".rstrip()
    return f"{clean(found.checkpoint)}, {where}"


def answer(verdict: Verdict) -> str:
    """How many records agree, under which limits."""
    held = f"{verdict.mode} mode, " if verdict.mode else ""
    held += f"limit {limit(verdict.limits.operations)}"
    if verdict.limits.logits != verdict.limits.operations:
        held += f", logits {limit(verdict.limits.logits)}"
    if verdict.limits.assumed:
        held += " (assumed)"
    if verdict:
        return f"parity: {verdict.compared:,} of {count(verdict.compared, 'record')} agree, {held}"
    wrong = sum(point.failed for point in verdict.points)
    if wrong:
        what = f"{wrong:,} of {count(verdict.compared, 'record')} differ"
    elif verdict.first_divergence is not None:
        what = f"{count(verdict.compared, 'record')} before it compared"
    else:
        what = "records are missing"
    return f"divergence: {what}, {held}"


def reasons(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Named sentences that explain a divergence; a name that repeats is empty."""
    found = verdict.last_agreement
    if found is not None and verdict.first_divergence is not None:
        where = (
            f"all {count(found.positions, 'position')}" if found.whole else f"its first {count(found.positions, 'position')}"
        )
        between = _between(found.checkpoint, verdict.first_divergence)
        yield "last agreement", f"{clean(found.checkpoint)}, {where}{between}"
    if verdict.operation:
        yield "operation", clean(verdict.operation)
    if verdict.pattern is not None:
        yield "pattern", clean(verdict.pattern.sentence)
    for origin in verdict.origins[1:4]:
        said = f"{clean(origin.first.checkpoint)}, {'position' if len(origin.positions) == 1 else 'positions'} "
        yield "also wrong", f"{said}{ranges(origin.positions)}: not caused by the first"
    if len(verdict.origins) > 4:
        yield "", f"and {count(len(verdict.origins) - 4, 'further point')} of origin"


def _between(last: str, first: Difference) -> str:
    before, after = parse(last).layer, first.layer
    if last == EMBD:
        before = -1
    if before is None or after is None or after <= before:
        return ""
    low = before + 1 if parse(last).kind == "l_out" or last == EMBD else before
    return f": the fault lies in layer {after}" if low == after else f": the fault lies in layers {low} to {after}"


def remarks(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Named sentences that hold for parity, too: what is missing, left out, assumed, noted."""
    for side, lacks in (("ours", verdict.missing_ours), ("the reference", verdict.missing_ref)):
        if lacks.records:
            yield "missing", f"{side} lacks {count(lacks.records, 'record')}: {_lacking(lacks)}"
    if verdict.left_out:
        yield "left out", f"{count(verdict.left_out, 'record')} after the tokens part"
    choices = verdict.choices
    if choices is not None and choices.differs_at is not None:
        said = f"after position {choices.differs_at} ours chooses {choices.ours_id}, the reference {choices.ref_id}"
        margin = f" (its margin: {choices.differs_margin:.2g})" if choices.differs_margin is not None else ""
        yield "first choice", said + margin
    if verdict.limits.assumed:
        yield "limit", verdict.limits.source
    for note in verdict.notes:
        yield "note", clean(note)


def _lacking(lacks: Missing) -> str:
    said: list[str] = []
    if lacks.points:
        listed = ", ".join(clean(name) for name in lacks.points[:3])
        said.append(listed + (f" and {count(len(lacks.points) - 3, 'further point')}" if len(lacks.points) > 3 else ""))
    if lacks.positions:
        said.append(f"positions {ranges(lacks.positions)}" + (" of common points" if lacks.points else ""))
    return "; ".join(said)
