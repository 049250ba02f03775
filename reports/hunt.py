"""A hunt as text and as JSON: one line for each run of the engine, then the cause or, without one, what was found."""

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
from .sentences import uncompared

_LABEL = 8
_OWN_TOKENS = "your engine computed other tokens than the prompt's (above): mend that first. On the tokens that its dump lists:"


def round_lines(hunt_round: Round, width: int) -> list[Text]:
    """One run: what was recorded, and where the sides diverge now."""
    return labelled(
        [(f"run {hunt_round.number}", f"{clean(_recorded(hunt_round))}: {clean(_parted(hunt_round.verdict))}")],
        width,
        label=_LABEL,
    )


def _recorded(hunt_round: Round) -> str:
    if not hunt_round.recorded:
        return "nothing new"
    if hunt_round.points not in ("default", "all"):
        return hunt_round.points
    layers = [parse(name).layer for name in hunt_round.recorded if parse(name).kind == "l_out"]
    outputs = set(layer_outputs([layer for layer in layers if layer is not None]))
    if set(hunt_round.recorded) <= outputs:
        rest = [name for name in hunt_round.recorded if name in ("embd", "output_norm", "logits")]
        return ", ".join([*rest[:1], count(len(layers), "layer"), *rest[1:]])
    return count(len(hunt_round.recorded), "point")


def _parted(verdict: Verdict) -> str:
    first, last = verdict.first_divergence, verdict.last_agreement
    if first is None:
        far = f", {uncompared(verdict.uncompared)}" if verdict.uncompared else ""
        return f"all agree{far}" if verdict else f"{verdict.verdict}{far}"
    sentence = f"divergence at {first.checkpoint}, position {first.token_idx}"
    return f"{sentence}; {last.checkpoint} agrees" if last is not None else sentence


def lines(hunt: Hunt, width: int) -> Iterator[Text]:
    """What follows the runs: the cause and how it was found or, without one, the comparison."""
    if hunt:
        yield from terminal.lines(hunt.verdict, width)
    else:
        if hunt.explanation is None or not hunt.explanation.causes or hunt.own_tokens:
            yield from terminal.lines(hunt.verdict, width)
            yield Text("")
        if hunt.own_tokens:
            yield from labelled([("tokens", _OWN_TOKENS)], width, label=_LABEL)
        if hunt.explanation is not None:
            yield from explanation.lines(hunt.explanation, width)
        yield from labelled(list(_left(hunt)), width, label=_LABEL)
    yield from (Text(line, style="dim") for note in hunt.notes for line in wrap(f"note: {clean(note)}", width))


def _left(hunt: Hunt) -> Iterator[tuple[str, str]]:
    if hunt.unexplained:
        yield "cause", f"not searched for: {clean(hunt.unexplained)}"
    whole = hunt.explanation is not None and hunt.explanation.causes and hunt.explanation.remaining is None
    if hunt.stopped and not whole:  # more points would tell nothing that the cause doesn't
        yield "stopped", clean(hunt.stopped)


def summary(hunt: Hunt) -> str:
    """How many runs and how much time it took."""
    return f"{count(len(hunt.rounds), 'run')} of your engine, {hunt.seconds:.1f} s"


def as_json(hunt: Hunt) -> dict[str, Any]:
    """The last comparison's answer, each run in `runs`, and explain's whole answer."""
    return verdict_as_json(hunt.verdict) | {
        "runs": [
            {
                "requested": step.points,
                "recorded": list(step.recorded),
                "verdict": step.verdict.verdict,
                "first_divergence": step.verdict.first_divergence.checkpoint if step.verdict.first_divergence else None,
                "last_agreement": step.verdict.last_agreement.checkpoint if step.verdict.last_agreement else None,
                "next": step.verdict.next,
            }
            for step in hunt.rounds
        ],
        "explanation": None if hunt.explanation is None else explanation.as_json(hunt.explanation),
        "explained_on_own_tokens": hunt.own_tokens,
        "unexplained": hunt.unexplained,
        "stopped": hunt.stopped,
        "notes": [*hunt.verdict.notes, *hunt.notes],
    }
