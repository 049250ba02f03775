"""A score as text, JSON and the Markdown block that a pull request asks for."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

from rich.text import Text

from checkpoints.answers.score import Scored, Worst
from checkpoints.structs import as_dict

from .as_json import plain
from .layout import labelled
from .numbers import clean, count
from .server import cause_lines


def lines(score: Scored, width: int) -> Iterator[Text]:
    """All figures, the worst position last."""
    yield from labelled(
        [
            ("side", clean(score.side)),
            *([("base", clean(score.base))] if score.base else []),
            ("text", f"{clean(score.text)}: {count(score.tokens, 'token')}, {_scored(score)}"),
        ],
        width,
    )
    yield Text("")
    yield from labelled([(name, value) for name, value in figures(score)], width)
    if score.worst is not None:
        yield Text("")
        yield from labelled(_worst(score.worst), width)
    for cause in score.causes:
        yield Text("")
        yield from labelled(list(cause_lines(cause)), width)
    yield from (Text(f"note: {clean(note)}", style="dim") for note in score.notes)
    yield Text(f"{count(score.positions, 'prediction')} in {score.seconds:.1f} s", style="dim")


def _scored(score: Scored) -> str:
    if not score.context:
        return f"{count(score.chunks, 'prompt')}, {count(score.positions, 'prediction')} (every position)"
    return (
        f"{count(score.chunks, 'chunk')} of {score.context}, {count(score.positions, 'prediction')} (the second half of each)"
    )


def figures(score: Scored) -> Iterator[tuple[str, str]]:
    """Names and values, in the order and with the definitions of llama-perplexity --kl-divergence."""
    least = (
        f" (at least: at {score.bounded} of {count(score.positions, 'position')} the text's token is not listed)"
        if score.bounded
        else ""
    )
    yield "perplexity", f"{score.perplexity:.4f} ± {score.perplexity_error:.4f}{least}"
    if score.kl_mean is None:
        return
    base = score.base_perplexity or 0.0
    yield "base's perplexity", f"{base:.4f}, ratio {'at least ' if score.bounded else ''}{score.perplexity / base:.6f}"
    bound = ""
    if not score.exact:
        bound = (
            " (lower bound: tokens that are not listed count as one; they have "
            f"{score.unseen_mean:.1e} of the base's probability on average, {score.unseen:.1e} at most)"
        )
    yield "KL divergence", f"mean {_number(score.kl_mean)} ± {_number(score.kl_error)}, max {_number(score.kl_max)}{bound}"
    yield "percentiles", " · ".join(f"{of:g} % {_number(value)}" for of, value in score.kl_percentiles.items())
    five = "" if score.top_k is None else f", first five shared {100 * score.top_k:.3f} %"
    yield "same first choice", f"{100 * (score.same_top or 0):.3f} %{five}"
    if score.delta_p_mean is not None:
        yield "Δp of the text", f"mean {100 * score.delta_p_mean:+.4f} %, RMS {100 * (score.delta_p_rms or 0):.4f} %"


def _number(value: float | None) -> str:
    return (
        "–"
        if value is None
        else "∞"
        if value == inf
        else "0"
        if value == 0
        else f"{value:.6f}"
        if value >= 1e-3
        else f"{value:.2e}"
    )


def _worst(worst: Worst) -> list[tuple[str, str]]:
    return [
        ("worst", f"chunk {worst.chunk}, position {worst.position}: KL {_number(worst.kl)}"),
        ("after", f"…{clean(worst.before)}"),
        ("text", f"{worst.token} {clean(repr(worst.text))}"),
        *[(name, _choices(top)) for name, top in (("side", worst.ours), ("base", worst.base)) if top],
    ]


def _choices(top: Sequence[tuple[int, float]]) -> str:
    return "  ".join(f"{number} {value:.4f}" for number, value in top)


def as_json(score: Scored) -> dict[str, Any]:
    """Every figure; `perplexity` and `kl` as the contract has them."""
    worst = score.worst
    facts = {
        "schema": 1,
        "side": score.side,
        "base": score.base,
        "model": score.model,
        "text": score.text,
        "tokens": score.tokens,
        "context": score.context,
        "chunks": score.chunks,
        "positions": score.positions,
        "perplexity": {
            "ours": plain(score.perplexity),
            "error": plain(score.perplexity_error),
            "base": plain(score.base_perplexity),
            "bounded": score.bounded,
        },
        "kl": None
        if score.kl_mean is None
        else {
            "mean": score.kl_mean,
            "error": score.kl_error,
            "max": score.kl_max,
            "percentiles": {f"{of:g}": value for of, value in score.kl_percentiles.items()},
            "exact": score.exact,
            "unseen": score.unseen,
            "unseen_mean": score.unseen_mean,
        },
        "same_top": score.same_top,
        "top_k": score.top_k,
        "delta_p": None if score.delta_p_mean is None else {"mean": score.delta_p_mean, "rms": score.delta_p_rms},
        "worst": None
        if worst is None
        else {
            "chunk": worst.chunk,
            "position": worst.position,
            "kl": worst.kl,
            "before": worst.before,
            "token": worst.token,
            "text": worst.text,
            "ours": [list(item) for item in worst.ours],
            "base": [list(item) for item in worst.base],
        },
        "causes": [as_dict(cause) for cause in score.causes],
        "seconds": round(score.seconds, 3),
        "notes": list(score.notes),
    }
    return {name: plain(value) for name, value in facts.items()}


def _explained(answer: Mapping[str, Any]) -> str:
    """What was found at the worst position, in a sentence."""
    if error := answer.get("error"):
        return f"the sides could not be compared: {clean(error['message'].rstrip('.'))}"
    first = answer.get("first_divergence")
    if not first and "predictions" in answer:
        return "a server differs from llama.cpp no more than its arithmetic explains"
    if not first:
        return "there both sides agree at every recorded operation: the distance is that of their weights or their arithmetic"
    causes = (answer.get("explanation") or {}).get("causes") or []
    cause = f"; cause: `{clean(causes[0]['fault'])}`" if causes else ""
    if "predictions" in answer:  # of a server, which has no checkpoints
        named = f"; cause: `{clean(answer['causes'][0]['name'])}`" if answer["causes"] else ""
        return f"the server's predictions differ from position {first['position']} on{named}"
    return f"it first diverges at `{clean(first['checkpoint'])}`, position {first['token_idx']}{cause}"


def markdown(score: Scored, explained: Mapping[str, Any] | None = None) -> str:
    """One block to paste; ends with a line break. `explained` is the answer (JSON) of the comparison at the worst position."""
    rows = [f"| {name} | {value} |" for name, value in figures(score)]
    worst: list[str] = []
    if explained is not None and score.worst is not None:
        place = f"chunk {score.worst.chunk}, position {score.worst.position}"
        worst = [f"At the worst prediction ({place}) {_explained(explained)}.", ""]
    worst += [
        line
        for cause in score.causes
        for line in (f"Cause: `{clean(cause.name)}`: {clean(cause.sentence)}. {clean(cause.advice)}", "")
    ]
    against = f" against {clean(score.base)}" if score.base else ""
    return "\n".join(
        [
            f"**{clean(score.side)}**{against}: `{clean(score.model)}` on `{clean(score.text)}`, {_scored(score)}",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            *worst,
        ]
    )
