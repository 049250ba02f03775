"""A hunt as text and as JSON: one line a run of the engine, then the cause, or what was found instead of one."""

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from checkpoints.answers.diff import Verdict
from checkpoints.answers.hunt import Hunt, Round
from checkpoints.points import layer_outputs, parse

from . import explanation, terminal
from .as_json import verdict_as_json
from .layout import labelled, wrap
from .numbers import clean, count

_LABEL = 8


def round_lines(found: Round, width: int) -> list[Text]:
    """One run: what was recorded, and where the sides diverge now."""
    return labelled(
        [(f"run {found.number}", f"{clean(_recorded(found))}: {clean(_parted(found.verdict))}")], width, label=_LABEL
    )


def _recorded(found: Round) -> str:
    if not found.recorded:
        return "nothing new"
    if found.asked not in ("default", "all"):
        return found.asked
    layers = [parse(name).layer for name in found.recorded if parse(name).kind == "l_out"]
    outputs = set(layer_outputs([layer for layer in layers if layer is not None]))
    if set(found.recorded) <= outputs:
        rest = [name for name in found.recorded if name in ("embd", "output_norm", "logits")]
        return ", ".join([*rest[:1], count(len(layers), "layer"), *rest[1:]])
    return count(len(found.recorded), "point")


def _parted(verdict: Verdict) -> str:
    first, last = verdict.first_divergence, verdict.last_agreement
    if first is None:
        return "all agree" if verdict else verdict.verdict
    said = f"divergence at {first.checkpoint}, position {first.token_idx}"
    return f"{said}; {last.checkpoint} agrees" if last is not None else said


def lines(found: Hunt, width: int) -> Iterator[Text]:
    """What stands behind the runs: the cause and how it was found; or the comparison, where there is none."""
    if found:
        yield from terminal.lines(found.verdict, width)
    else:
        if found.explanation is None or not found.explanation.causes:
            yield from terminal.lines(found.verdict, width)
            yield Text("")
        if found.explanation is not None:
            yield from explanation.lines(found.explanation, width)
        yield from labelled(list(_left(found)), width, label=_LABEL)
    yield from (Text(line, style="dim") for note in found.notes for line in wrap(f"note: {clean(note)}", width))


def _left(found: Hunt) -> Iterator[tuple[str, str]]:
    if found.unexplained:
        yield "cause", f"not looked for: {clean(found.unexplained)}"
    whole = found.explanation is not None and found.explanation.causes and found.explanation.remaining is None
    if found.stopped and not whole:  # more points would tell nothing that the cause doesn't
        yield "stopped", clean(found.stopped)


def summary(found: Hunt) -> str:
    """What it took."""
    return f"{count(len(found.rounds), 'run')} of your engine, {found.seconds:.1f} s"


def as_json(found: Hunt) -> dict[str, Any]:
    """The last comparison's answer, each run in `runs`, and explain's whole answer."""
    return verdict_as_json(found.verdict) | {
        "runs": [
            {
                "asked": step.asked,
                "recorded": list(step.recorded),
                "verdict": step.verdict.verdict,
                "first_divergence": step.verdict.first_divergence.checkpoint if step.verdict.first_divergence else None,
                "last_agreement": step.verdict.last_agreement.checkpoint if step.verdict.last_agreement else None,
                "next": step.verdict.next,
            }
            for step in found.rounds
        ],
        "explanation": None if found.explanation is None else explanation.as_json(found.explanation),
        "unexplained": found.unexplained,
        "stopped": found.stopped,
        "notes": [*found.verdict.notes, *found.notes],
    }
