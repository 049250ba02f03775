"""A verdict in sentences, the same in the terminal, the HTML report and Markdown. Text from dumps is cleaned, not escaped."""

import re
from collections.abc import Iterator, Sequence
from math import isfinite, isinf

from checkpoints.answers.diff import (
    DIVERGENCE,
    INCOMPLETE,
    Difference,
    Missing,
    RecordFault,
    Seen,
    TruthPoint,
    Uncompared,
    Verdict,
)
from checkpoints.points import EMBD, LOGITS, parse

from .limits import assumed, hidden_by_rounding, limits_of_their_own
from .numbers import clean, count, error, limit, ranges, token


def headline(verdict: Verdict) -> str:
    """Where the sides diverge, or that they agree, in one line."""
    first = verdict.first_divergence
    if first is not None:
        return f"divergence at {place(first)}"
    if verdict.verdict == INCOMPLETE:
        lacking = [uncompared(verdict.uncompared)] if verdict.uncompared else []
        return f"{INCOMPLETE} ({', '.join([*lacking, *(['the result cannot be judged'] if verdict.unjudged.result else [])])})"
    if verdict:
        return f"parity{far}" if (far := as_far_as_it_goes(verdict)) else "parity"
    return f"{DIVERGENCE}: records are missing"


def as_far_as_it_goes(verdict: Verdict) -> str:
    """ " as far as it goes (…)", if nothing was compared after some point or at some positions, or records cannot be judged, else ""."""
    lacks, unjudged = verdict.uncompared, verdict.unjudged
    parts = [uncompared(lacks)] if lacks.after or lacks.positions else []
    parts += [f"{count(unjudged.records, 'record')} cannot be judged: even zeros would pass"] if unjudged else []
    return f" as far as it goes ({'; '.join(parts)})" if parts else ""


def no_verdict(points: Sequence[str]) -> str:
    """Why nothing can be said about points, and what would help."""
    return (
        f"{_first_names(points)}: in this arithmetic rounding alone moves the values as far as they are large; even zeros would be within "
        "the limit. Compute in float32 for this comparison, or record all points in whole rows: parity isolate judges each operation by "
        "its own inputs"
    )


def uncompared(lacks: Uncompared) -> str:
    """ "nothing after blk.10.l_out, nothing at positions 3–4"."""
    parts: list[str] = []
    if lacks.after:
        parts.append(f"nothing after {clean(lacks.after)}")
    elif len(lacks.points) == lacks.requested > 0:
        parts.append("no point that was asked for")
    elif lacks.points:
        parts.append(f"without {_first_names(lacks.points)}")
    if lacks.positions:
        parts.append(f"nothing at {'position' if len(lacks.positions) == 1 else 'positions'} {ranges(lacks.positions)}")
    return ", ".join(parts)


def place(difference: Difference) -> str:
    """ "blk.5.l_out, position 1 " upon""."""
    where = f"position {difference.token_idx} {token(difference.token)}".rstrip()
    return f"{clean(difference.checkpoint)}, {where}"


def answer(verdict: Verdict) -> str:
    """How many records agree, under which limits."""
    judged_by = f"{verdict.mode} mode, " if verdict.mode else ""
    judged_by += f"limit {limit(verdict.limits.operations)}"
    if verdict.limits.logits != verdict.limits.operations:
        judged_by += f", logits {limit(verdict.limits.logits)}"
    own = limits_of_their_own(verdict)
    if own:
        low, high = (limit(find(own.values())) for find in (min, max))
        judged_by += f" ({count(len(own), 'point')} with limits of {low if low == high else f'{low} to {high}'})"
    otherwise = sum(fault.records for fault in verdict.record_faults)
    precision = verdict.precision
    far = as_far_as_it_goes(verdict)
    open_records = f", {verdict.unjudged.records:,} cannot be judged" if verdict.unjudged else ""
    if verdict.verdict == INCOMPLETE and open_records:
        agreeing = verdict.compared - otherwise - verdict.unjudged.records
        return f"{headline(verdict)}: {agreeing:,} of {count(verdict.compared, 'record')} agree{open_records}, {judged_by}"
    if verdict.verdict == INCOMPLETE:
        return f"{headline(verdict)}: all {count(verdict.compared, 'record')} that came agree, {judged_by}"
    if verdict:
        sentence = f"{verdict.compared - otherwise - verdict.unjudged.records:,} of {count(verdict.compared, 'record')} agree"
        sentence += f", {otherwise:,} recorded otherwise" if otherwise else ""
        if verdict.uncompared.points and not verdict.uncompared.after:
            lacking, asked = len(verdict.uncompared.points), count(verdict.uncompared.requested, "known point")
            sentence += f", {lacking} of {asked} never compared"
        if verdict.excused:
            sentence += (
                f", {verdict.excused:,} of them only as amplified rounding, which is assumed (--model M.gguf settles it)"
            )
        if precision is not None and precision.source == "assumed" and precision.arithmetic == "f32":
            return f"parity{far}: {sentence}, as float32 does: worst {error(verdict.worst.nmse if verdict.worst else None)}"
        if precision is None or precision.source == "stated" or precision.arithmetic == "f32":
            return f"parity{far}: {sentence}, {judged_by}"
        how = "assumed: your dump does not say" if precision.assumed else "measured on the model"
        at = f", worst {error(verdict.worst.nmse)} at {clean(verdict.worst.checkpoint)}" if verdict.worst is not None else ""
        kinds = " or ".join(ARITHMETIC[kind] for kind in (precision.arithmetic, *precision.alike))
        return f"parity{far} as {kinds} arithmetic ({how}): {sentence}{at}"
    wrong = sum(point.failed for point in verdict.points)
    if wrong:
        unjudged = verdict.pattern is not None and verdict.pattern.code == "reference-nonfinite"
        how = "differ or cannot be judged" if unjudged else "differ"
        outcome = f"{wrong:,} of {count(verdict.compared, 'record')} {how}"
    elif verdict.first_divergence is not None:
        how = "compared" if verdict.record_faults or not verdict.compared else "agrees" if verdict.compared == 1 else "agree"
        outcome = f"{count(verdict.compared, 'record')} before it {how}"
    else:
        outcome = "records are missing"
    return f"divergence{' (limit assumed)' if verdict.limits.assumed else ''}: {outcome}, {judged_by}"


GROWN = "as lower precision does"  # the end of a sentence on an operation whose error grew from that of its inputs
ARITHMETIC = {"": "lower", "f32": "float32", "tf32": "TF32", "f16": "F16", "bf16": "BF16", "q8": "8-bit"}
_KEPT = {
    "cache": 'the cache keeps keys and values in {named}, which nothing states ("kv_type": "{stated}" in the header does)',
    "vectors": "norms' weights and biases are kept in {named}, which nothing states",
    "gains": "norms' weights are kept in {named} and their biases are not, which nothing states",
    "biases": "biases are kept in {named}, which nothing states",
    "angles": "RoPE's cosines and sines are kept in {named}, which nothing states",
}


def kept_in(part: str, kind: str) -> str:
    """A sentence: an engine that computes in float32 keeps some of what it reads (`engine.replay.kept`) in a lower type."""
    named, stated = ("Q8_0", "q8_0") if kind == "q8" else (ARITHMETIC[kind], kind)
    return _KEPT[part].format(named=named, stated=stated)


def reasons(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Named sentences that explain a divergence; a name that repeats is empty."""
    agreement = verdict.last_agreement
    if agreement is not None and verdict.first_divergence is not None:
        where = (
            f"all {count(agreement.positions, 'position')}"
            if agreement.whole
            else f"its first {count(agreement.positions, 'position')}"
        )
        between = _between(agreement.checkpoint, verdict.first_divergence)
        if between and any(item.checkpoint == agreement.checkpoint and not item.whole for item in verdict.seen):
            between += f", or in what was not recorded of {clean(agreement.checkpoint)}"
        yield "last agreement", f"{clean(agreement.checkpoint)}, {where}{between}"
    if verdict.operation:
        yield "operation", clean(verdict.operation)
    if verdict.pattern is not None:
        yield "pattern", clean(verdict.pattern.sentence)
    if verdict.truth is not None and verdict.first_divergence is not None:
        yield "float64", truth(verdict.truth, by_file=not verdict.ignored, blaming=not _may_be_arithmetic(verdict))
    for number, sentence in enumerate(verdict.ignored):
        yield "" if number else "metadata", clean(sentence)
    for origin in verdict.origins[1:4]:
        text = f"{clean(origin.first.checkpoint)}, {'position' if len(origin.positions) == 1 else 'positions'} "
        how = "not caused by the first" if origin.first.fresh else "grown from errors below the limit before it"
        yield "also wrong", f"{text}{ranges(origin.positions)}: {how}"
    if len(verdict.origins) > 4:
        yield "", f"and {count(len(verdict.origins) - 4, 'further point')} of origin"
    if verdict.first_divergence is not None and _unrecorded(verdict.first_divergence):
        yield "values", "the recorded ones agree; the rest of the row differs, as its sketch or its statistics show"


def _unrecorded(difference: Difference) -> bool:
    """Whether the values that a record holds agree, and what else is known of its row does not."""
    if difference.nmse_slice is None or difference.nmse_row is None:
        return False
    return difference.nmse_slice <= difference.limit < difference.nmse_row


def _may_be_arithmetic(verdict: Verdict) -> bool:
    """Whether a lower arithmetic, which nothing rules out, may explain everything: the answer then blames no operation."""
    in_float32 = (
        verdict.precision is not None and verdict.precision.source == "stated" and verdict.precision.arithmetic == "f32"
    )
    undecided = verdict.pattern is not None and verdict.pattern.code in ("eight-bits", "undecided", "precision", "drift")
    blamed = verdict.operation and not verdict.operation.endswith(GROWN)
    return undecided and not blamed and not in_float32


def truth(point: TruthPoint, *, by_file: bool = True, blaming: bool = True) -> str:
    """How far both sides are from the same steps in float64, and which of them is the one that is off.

    The steps are those of llama.cpp's graph. Unless these are also what the metadata say (`by_file`), a side that is far from them may
    be right. So may a side in a lower arithmetic (not `blaming`).
    """
    if point.ref is not None and isinf(point.ref) and point.ours is not None and isfinite(point.ours):
        return f"ours is {error(point.ours)} from the same steps in float64; the reference is not finite"
    sentence = f"ours is {error(point.ours)} from the same steps in float64, the reference {error(point.ref)}"
    if point.alone == "ours" and not blaming:
        return f"{sentence}: more than float32's rounding, a lower arithmetic's or a fault's"
    if point.alone == "ours":
        return f"{sentence}: ours {'is wrong' if by_file else 'computes something else'}"
    if point.alone == "reference":
        return f"{sentence}: the reference is the less accurate one"
    return f"{sentence}: neither is much closer"


def _everywhere(points: Sequence[TruthPoint]) -> Iterator[str]:
    """The worst record of each side against float64, over all points for which that was computed."""
    for name, far in (
        ("ours", [(point.ours, point.checkpoint) for point in points if point.ours is not None]),
        ("the reference", [(point.ref, point.checkpoint) for point in points if point.ref is not None]),
    ):
        if far:
            worst, where = max(far)
            yield f"{name} is at most {error(worst)} from float64, at {clean(where)}"


def _between(last: str, first: Difference) -> str:
    before, after = parse(last).layer, first.layer
    if last == EMBD:
        before = -1
    if before is None or after is None or after <= before:
        return ""
    low = before + 1 if parse(last).kind == "l_out" or last == EMBD else before
    return f": the fault lies in layer {after}" if low == after else f": the fault lies in layers {low} to {after}"


def remarks(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Named sentences that apply to parity, too: what is missing, left out, assumed, noted."""
    for side, lacks in (("ours", verdict.missing_ours), ("the reference", verdict.missing_ref)):
        if lacks.records:
            yield "missing", f"{side} lacks {count(lacks.records, 'record')}: {_lacking(lacks)}"
    if not set((lacking := verdict.uncompared).points) <= set(verdict.missing_ours.points):
        some = f"{len(lacking.points)} of {count(lacking.requested, 'point')}"
        yield "missing", f"your engine printed nothing of {some}: {_first_names(lacking.points)}"
    if verdict.unjudged:
        yield "no verdict", no_verdict(verdict.unjudged.points)
    if verdict.left_out:
        yield "left out", f"{count(verdict.left_out, 'record')} after the position at which the tokens differ"
    yield from (("recorded", sentence) for sentence in _recorded(verdict))
    mapping = tuple(dict.fromkeys(clean(fault.map) for fault in verdict.record_faults if fault.map))
    if mapping:
        yield (
            "",
            f"to record this permanently: --map names.toml, with {'this line' if len(mapping) == 1 else 'these lines'} below [names]:",
        )
        yield from ((MAP_LINE, line) for line in mapping)
    if seen := rows_seen(verdict.seen):
        yield "seen", seen
    if verdict and (passing := hidden_by_rounding(verdict)):
        yield "noise", passing
    choices = verdict.choices
    if choices is not None and choices.differs_at is not None:
        seen = f"after position {choices.differs_at} ours chooses {choices.ours_id}, the reference {choices.ref_id}"
        margin = f" (its margin: {choices.differs_margin:.2g})" if choices.differs_margin is not None else ""
        yield "first choice", seen + margin
    yield from assumed(verdict)
    if verdict.first_divergence is None and (seen := "; ".join(_everywhere(verdict.truth_points))):
        yield "float64", seen
    for note in verdict.notes:
        yield "note", clean(note)


MAP_LINE = "names.toml"  # names a remark that is a line to be copied
RECORDED = {
    "layout": "another layout",
    "name": "another point",
    "moment": "another moment",
    "type": "another type",
    "length": "another length",
    "nonfinite": "NaN in the record only",
    "unknown": "recorded otherwise",
}  # what a record shows instead, by the kind of the fault


def _recorded(verdict: Verdict) -> Iterator[str]:
    """What our records hold in place of what their names say: one sentence for all layers that are alike."""
    alike: dict[tuple[str, str, str], list[RecordFault]] = {}
    for fault in verdict.record_faults:
        reading, _, agreeing = fault.sentence.partition("; ")
        reading = by_distance(reading, fault.layer)
        alike.setdefault((parse(fault.checkpoint).kind, reading, agreeing if fault.layer is None else ""), []).append(fault)
    for (kind, reading, _), faults in list(alike.items())[:6]:
        layers = tuple(fault.layer for fault in faults if fault.layer is not None)
        where = clean(faults[0].checkpoint) if len(faults) == 1 else f"blk.{_layers(layers)}.{clean(kind)}"
        agreeing = faults[0].sentence.partition("; ")[2]
        shown = in_layers(reading, layers)
        yield clean(f"{where}: {shown}" + (f"; {agreeing}" if agreeing else ""))
    if len(alike) > 6:
        yield f"and {len(alike) - 6} more like this (--format json: record_faults)"


_LAYER = re.compile(r"\bblk\.(\d+)\.")
_AWAY = re.compile(r"blk\.<(-?\d+)>\.")  # a layer by its distance


def by_distance(sentence: str, layer: int | None) -> str:
    """A sentence about a point, with the layers of other points as distances from its own: so it is the same for all layers."""
    return sentence if layer is None else _LAYER.sub(lambda match: f"blk.<{int(match[1]) - layer}>.", sentence)


def in_layers(sentence: str, layers: tuple[int, ...]) -> str:
    """The sentence with these layers' numbers instead of distances."""
    return _AWAY.sub(lambda match: f"blk.{_layers(tuple(layer + int(match[1]) for layer in layers))}.", sentence)


def _layers(layers: tuple[int, ...]) -> str:
    """Layers as `--points` has them: "5", "{0,5,10}", "{0..23}"."""
    if len(layers) == 1:
        return str(layers[0])
    spans = ranges(layers)
    whole = "–" in spans and "," not in spans
    return "{" + (spans.replace("–", "..") if whole else ",".join(map(str, layers))) + "}"


def rows_seen(points: Sequence[Seen]) -> str:
    """How much of a row was compared, where that is not all of it: "16 of 256 values per row, no sketch; logits 16 of 2,048"."""
    parts = [item for item in points if not (item.sketch or (item.of is not None and item.values >= item.of))]
    if not parts:
        return ""
    logits = [item for item in parts if item.checkpoint == LOGITS]
    others = [item for item in parts if item.checkpoint != LOGITS]
    sentences: list[str] = []
    if others:
        values = sorted({item.values for item in others})
        of = sorted({item.of for item in others if item.of is not None})
        number = f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"
        sizes = "" if not of else (f" of {of[0]:,}" if len(of) == 1 else f" of {of[0]:,} to {of[-1]:,}")
        besides = "statistics, no sketch" if all(item.statistics for item in others) else "no sketch"
        noun = "value" if number == "1" and not of else "values"
        sentences.append(f"{number}{sizes} {noun} per row, {besides}")
    if logits:
        seen = f"{logits[0].values} of {logits[0].of:,}" if logits[0].of is not None else count(logits[0].values, "value")
        sentences.append(f"logits {seen}")
    return "; ".join(sentences)


def _first_names(points: Sequence[str]) -> str:
    listed = ", ".join(clean(name) for name in points[:3])
    return listed + (f" and {count(len(points) - 3, 'further point')}" if len(points) > 3 else "")


def _lacking(lacks: Missing) -> str:
    parts: list[str] = []
    if lacks.points:
        parts.append(_first_names(lacks.points))
    if lacks.positions:
        noun = "position" if len(lacks.positions) == 1 else "positions"
        parts.append(f"{noun} {ranges(lacks.positions)}" + (" of common points" if lacks.points else ""))
    return "; ".join(parts)
