"""`parity explain` in the terminal and as JSON."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

from checkpoints.answers.explain import Cause, DivergentPlace, Explanation, Lead, Named, TruthAt

from .layout import labelled, wrap
from .limits import pass_for_rounding
from .numbers import count, error, limit
from .sentences import no_verdict, rows_seen
from .suspected import suspected

_ARITHMETIC = {
    "f16": "F16 (10 bits of mantissa)",
    "tf32": "TF32 (10 bits of mantissa)",
    "bf16": "BF16 (7 bits of mantissa)",
    "q8": "quantised activations (8 bits in blocks)",
}
_STATED = {"header": "the header says f32", "--compute": "--compute f32 was given"}
_WITH_NEXT = "reproduces the records only together with the next cause, which is in the same place"
_LABEL = 8
_OPERATIONS = 12  # operations in question that are listed


def lines(explanation: Explanation, width: int) -> Iterator[Text]:
    """The verdict first: causes, or that there is no fault, or what is known if no cause was found."""
    if explanation.judged_as:
        yield from _lines([("assumed", explanation.judged_as)], width)
    for number, cause in enumerate(explanation.causes):
        yield from _cause(cause, number, explanation, width)
    if explanation.unjudged:
        yield from _lines([("undecided", no_verdict(explanation.unjudged))], width)
    elif explanation.first is None and explanation.precision_only:
        within = f"agrees to within the noise of {_arithmetic(explanation.precision_only, explanation)}"
        hidden = pass_for_rounding(*explanation.passes)
        yield from _lines([("no fault", within), *([("noise", hidden)] if hidden else [])], width)
    elif explanation.first is None:
        noisy = any(note.startswith("noise:") for note in explanation.notes)
        within = ", some only within the noise named in the note" if noisy else ""
        yield from _lines([("no fault", f"all {explanation.records:,} records agree with the right engine{within}")], width)
    elif explanation.precision_only:
        yield from _precision(explanation, width)
    elif explanation.remaining is not None:
        yield from _left(explanation, explanation.remaining, width)
    if explanation.suspects:
        yield from _lines([("suspect", sentence) for sentence in suspected(explanation.suspects)], width)
    if explanation and (seen := rows_seen(explanation.seen)):
        yield from _lines([("seen", f"{seen}: the rest of the rows is unknown")], width)
    if explanation.truth is not None:
        coarse = bool(explanation) or bool(explanation.left_open) or explanation.rounds
        yield from _lines([("truth", _truth(explanation.truth, coarse=coarse))], width)
    if explanation.variants:
        nearest = (
            f"; the nearest other one leaves NMSE {error(explanation.nearest)}"
            if explanation.nearest is not None and not explanation
            else ""
        )
        searched = f"tried {count(explanation.faults, 'fault')} ({count(explanation.variants, 'variant')}) in {explanation.seconds:.1f} s"
        searched += "" if explanation.complete or explanation.remaining is not None else ", all that the budget left time for"
        yield from (Text(line, style="dim") for line in wrap(searched + nearest, width))
    yield from (Text(line, style="dim") for note in explanation.notes for line in wrap(f"note: {note}", width))


def _lines(rows: Sequence[tuple[str, str]], width: int) -> list[Text]:
    """A bold head, and what belongs to it indented below."""
    (name, sentence), *rest = rows
    head = labelled([(name, sentence)], width, label=_LABEL)
    head[0].stylize("bold")
    return [*head, *labelled(rest, width, label=10, indent=_LABEL)]


def layers_text(layers: tuple[int, ...] | None, *, left_over: bool = False) -> str:
    """The layers in words: "" for all, ", only in layer 17", ", only in layers 7 to 23", ", only in layers 1, 3, … 23".

    `left_over`: whether the causes leave something unexplained. A fault of all layers is then only known in the layers before that
    place, and the text is ", at least in layers 0 to 5".
    """
    if layers is None:
        return ""
    limited = "at least" if left_over and layers == tuple(range(len(layers))) else "only"
    if len(layers) == 1:
        return f", {limited} in layer {layers[0]}"
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f", {limited} in layers {layers[0]} to {layers[-1]}"
    return f", {limited} in layers {', '.join(map(str, layers if len(layers) < 4 else layers[:2]))}" + (
        f", … {layers[-1]}" if len(layers) > 3 else ""
    )


def _cause(cause: Cause, number: int, explanation: Explanation, width: int) -> list[Text]:
    named = cause.named
    left_over = explanation.remaining is not None
    total = f"{cause.records:,} of {count(explanation.differing, 'differing record')}"
    together = "with the causes above, reproduces" if number else "reproduces"
    rows = [
        ("cause", f"{named.fault}: {named.sentence}{layers_text(named.layers, left_over=left_over)}"),
        *([("begins", _begins(explanation, explanation.first))] if not number and explanation.first is not None else []),
        ("numbers", cause.hidden or (f"{together} {total}, worst NMSE {error(cause.nmse)}" if cause.records else _WITH_NEXT)),
        ("looks", cause.symptom),
        ("fix", cause.fix),
        ("seen in", cause.seen),
    ]
    # Two sets of parameters may have the same words.
    same = list(dict.fromkeys(_same(other, left_over=left_over) for other in cause.equivalent))
    rows += [("same as", sentence) for sentence in same[:4]]
    if len(same) > 4:
        rows.append(("same as", f"and {len(same) - 4} more (--format json lists them)"))
    if cause.apart:
        rows.append(("apart", cause.apart))
    return _lines(rows, width)


def _begins(explanation: Explanation, first: DivergentPlace) -> str:
    """Where the dump first differs, and the last point that agrees."""
    before = f"; {explanation.last_agreement} agrees" if explanation.last_agreement is not None else ""
    return f"{first.checkpoint}, position {first.token_idx}, NMSE {error(first.nmse)}{before}"


def _same(named: Named, *, left_over: bool = False) -> str:
    return f"{named.fault}: {named.sentence}{layers_text(named.layers, left_over=left_over)}"


def _arithmetic(kind: str, explanation: Explanation) -> str:
    """The arithmetic that fits best, and those that cannot be told from it."""
    return " or ".join(_ARITHMETIC[arithmetic] for arithmetic in dict.fromkeys((kind, *explanation.precision_alike)))


def _precision(explanation: Explanation, width: int) -> list[Text]:
    first = explanation.first
    named = _arithmetic(explanation.precision_only, explanation)
    sentence = (
        f"if it computes in {named}, which is assumed: nothing states it, and a fault with errors as small and as scattered looks alike"
        if explanation.precision_assumed
        else f"the differences are those of {named}: a right engine in that arithmetic"
    )
    rows = [("no fault", sentence)]
    if explanation.hides and first is not None:
        rows.append(("hides", _hides(explanation.hides, first)))
    if first is not None:
        rows.append(("begins", f"{first.checkpoint}, position {first.token_idx}, NMSE {error(first.nmse)}"))
    rows.append(("if not", "intended, look for a lower type: TF32 enabled, F16 weights or cache, quantised activations"))
    return _lines(rows, width)


def _hides(parts: Sequence[tuple[str, float]], place: DivergentPlace) -> str:
    """How large a factor passes, at the operation that hides most, and at the place itself."""
    of_place = dict(parts).get(place.checkpoint)
    here = f", {place.checkpoint} {1 + of_place:.5g} times" if of_place is not None and len(parts) > 1 else ""
    name, part = parts[0]
    return f"a fault as small as this would pass: {name} {1 + part:.5g} times the right one{here}"


def _left(explanation: Explanation, place: DivergentPlace, width: int) -> list[Text]:
    judged_by = f"limit {limit(place.limit)}" if place.nmse > place.limit else "which alone would be noise"
    where = f"{place.checkpoint}, position {place.token_idx}: NMSE {error(place.nmse)}, {judged_by}"
    suspect = place.checkpoint in {other.checkpoint for other in explanation.suspects}
    if suspect and not explanation.causes:
        rows = [("no cause", f"no operation is to blame for what differs first, {where}")]
    elif explanation.causes:
        rows = [("left over", f"the causes above do not reproduce {where}")]
    elif explanation.left_open:
        rows = [("undecided", f"{where}: {explanation.left_open}")]
    else:
        rows = [("no cause", f"no known fault reproduces what differs first, {where}")]
    if explanation.law:
        rows.append(("law", f"at {place.checkpoint} {explanation.law}"))
    rows += [] if suspect else _where(explanation)
    if explanation.looks_like:
        rows.append(("looks", f"the numbers look like {_arithmetic(explanation.looks_like, explanation)}{_but(explanation)}"))
    if not explanation.complete:
        rows.append(
            (
                "time",
                "the budget ran out before everything was tried: give more with --budget, or record the points below for a quicker search",
            )
        )
    rows += [("numbers" if lead.removed is None else "lead", _lead(lead)) for lead in explanation.leads]
    if explanation.next:
        wider = f" --slice {explanation.next_slice}" if explanation.next_slice else ""
        rows.append(("next", f"record these and run explain again:  --points '{explanation.next}'{wider}"))
    return _lines(rows, width)


def _but(explanation: Explanation) -> str:
    """Why an arithmetic that the numbers look like is not the answer."""
    if explanation.f32_stated:
        return f", but {_STATED[explanation.f32_stated]}"
    return (
        f", and a fault of that size cannot be told from them. State your engine's arithmetic: --compute {explanation.looks_like} treats "
        "them as noise, --compute f32 rules them out"
    )


def _where(explanation: Explanation) -> list[tuple[str, str]]:
    """Which operation is wrong, or after which point the fault lies, and how much of that point was recorded."""
    placed = explanation.placed
    if placed is None:
        agreed = explanation.last_agreement is not None and not explanation.causes
        return [("after", f"{explanation.last_agreement}, where everything agrees")] if agreed else []
    agreeing = " and ".join(placed.agreeing[:3]) + (" and more" if len(placed.agreeing) > 3 else "")
    agree = "agrees" if len(placed.agreeing) == 1 else "agree"
    if not placed.sure and placed.agreeing:
        seen = (
            "" if placed.seen is None else f" in the {count(placed.seen[0], 'value')} of {placed.seen[1]:,} that were recorded"
        )
        return [
            (
                "after",
                f"{agreeing}, which {agree}{seen}: the rest may be wrong there already (--slice or a sketch shows it)",
            )
        ]
    if placed.behind:
        why = "its recorded elements are right, and each of them is made from all that goes in"
        return [("wrong", f"{placed.operations[0]}: {why}: this operation is wrong, in elements that were not recorded")]
    if len(placed.operations) == 1:
        origin = (
            f"is computed from {agreeing}, which {agree} as whole rows"
            if placed.agreeing
            else "is computed from the tokens alone"
        )
        return [("wrong", f"{placed.operations[0]} {origin}: this operation is wrong")]
    if not placed.agreeing:
        return []
    if len(placed.operations) > _OPERATIONS:
        return [("after", f"{agreeing}, which {agree} as whole rows")]
    # "node.103" is llama.cpp's number of a step without a name, and tells a reader nothing.
    named = [name for name in placed.operations if not name.startswith("node.")] or list(placed.operations)
    unnamed = ", or an unnamed step before it" if len(named) == 1 else ", or an unnamed step between them"
    which = f"{'one of ' if len(named) > 1 else ''}{', '.join(named)}{unnamed if len(named) < len(placed.operations) else ''}"
    return [("wrong", f"{which}: {agreeing} {agree} as whole rows")]


def _truth(truth: TruthAt, *, coarse: bool) -> str:
    """How far both are from float64; an engine that is right in a lower arithmetic, or may be, is not called wrong by it."""
    sentence = f"at the first place yours is {error(truth.ours)} from the same steps in float64, "
    sentence += f"a right float32 engine {error(truth.right)}"
    if truth.ours <= 100 * truth.right:
        return sentence
    return f"{sentence}: yours is {'coarser' if coarse else 'wrong'}"


def _lead(lead: Lead) -> str:
    if lead.named is None or lead.removed is None:
        return lead.sentence
    return f"{lead.removed:.1%} of the error disappears with {_same(lead.named)}"


def _verdict(explanation: Explanation) -> str:
    if explanation.unjudged or explanation.left_open:
        return "undecided"
    return "no fault" if explanation else ("explained" if explanation.remaining is None else "unexplained")


def as_json(explanation: Explanation) -> dict[str, Any]:
    """The answer as one JSON object."""
    return {
        "schema": 1,
        "verdict": _verdict(explanation),
        "causes": [_cause_as_json(cause) for cause in explanation.causes],
        "leads": [
            {"sentence": lead.sentence, "removed": lead.removed, **(_named_as_json(lead.named) if lead.named else {})}
            for lead in explanation.leads
        ],
        "law": explanation.law or None,
        "operations": list(explanation.placed.operations) if explanation.placed is not None and explanation.placed.sure else [],
        "record_suspect": [
            {"checkpoint": suspect.checkpoint, "agreeing": list(suspect.agreeing), "shows": suspect.shows or None}
            for suspect in explanation.suspects
        ],
        "precision_only": explanation.precision_only or None,
        "precision_assumed": explanation.precision_assumed,
        "hides": [{"checkpoint": name, "part": part} for name, part in explanation.hides],
        "unjudged": list(explanation.unjudged),
        "left_open": explanation.left_open or None,
        "precision_alike": list(explanation.precision_alike),
        "passes": {"rows": explanation.passes[0], "logits": explanation.passes[1]},
        "judged_as": explanation.judged_as or None,
        "looks_like": explanation.looks_like or None,
        "f32_stated": explanation.f32_stated or None,
        "truth": None if explanation.truth is None else {"ours": explanation.truth.ours, "right": explanation.truth.right},
        "compared": explanation.records,
        "differing": explanation.differing,
        "first_divergence": _place_as_json(explanation.first),
        "last_agreement": explanation.last_agreement,
        "remaining": _place_as_json(explanation.remaining),
        "next": explanation.next or None,
        "next_slice": explanation.next_slice,
        "tried": {
            "faults": explanation.faults,
            "variants": explanation.variants,
            "nearest": explanation.nearest,
            "complete": explanation.complete,
        },
        "seconds": round(explanation.seconds, 3),
        "notes": list(explanation.notes),
    }


def _cause_as_json(cause: Cause) -> dict[str, Any]:
    return {
        **_named_as_json(cause.named),
        "explained": cause.explained,
        "nmse": cause.nmse,
        "symptom": cause.symptom,
        "fix": cause.fix,
        "seen": cause.seen,
        "equivalent": [_named_as_json(other) for other in cause.equivalent],
        "apart": cause.apart or None,
        "hidden": cause.hidden or None,
    }


def _named_as_json(named: Named) -> dict[str, Any]:
    return {
        "fault": named.fault,
        "parameters": named.parameters,
        "layers": None if named.layers is None else list(named.layers),
        "sentence": named.sentence,
    }


def _place_as_json(place: DivergentPlace | None) -> dict[str, Any] | None:
    if place is None:
        return None
    nmse = place.nmse if place.nmse != float("inf") else "Infinity"
    return {"checkpoint": place.checkpoint, "token_idx": place.token_idx, "nmse": nmse, "limit": place.limit}
