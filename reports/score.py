"""A score as text, JSON and the Markdown block that a pull request asks for."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

from checkpoints.answers.score import Scored, Worst

from .as_json import plain
from .layout import labelled
from .numbers import clean, count


def lines(found: Scored, width: int) -> Iterator[Text]:
    """All figures, the worst position last."""
    yield from labelled(
        [
            ("side", clean(found.side)),
            *([("base", clean(found.base))] if found.base else []),
            ("text", f"{clean(found.text)}: {count(found.tokens, 'token')}, {_scored(found)}"),
        ],
        width,
    )
    yield Text("")
    yield from labelled([(name, value) for name, value in figures(found)], width)
    if found.worst is not None:
        yield Text("")
        yield from labelled(_worst(found.worst), width)
    yield from (Text(f"note: {clean(note)}", style="dim") for note in found.notes)
    yield Text(f"{count(found.positions, 'prediction')} in {found.seconds:.1f} s", style="dim")


def _scored(found: Scored) -> str:
    return (
        f"{count(found.chunks, 'chunk')} of {found.context}, {count(found.positions, 'prediction')} (the second half of each)"
    )


def figures(found: Scored) -> Iterator[tuple[str, str]]:
    """Names and values, in the order and with the definitions of llama-perplexity --kl-divergence."""
    yield "perplexity", f"{found.perplexity:.4f} ± {found.perplexity_error:.4f}"
    if found.kl_mean is None:
        return
    base = found.base_perplexity or 0.0
    yield "base's perplexity", f"{base:.4f}, ratio {found.perplexity / base:.6f}"
    bound = "" if found.exact else f" (lower bound: the base's other tokens, {found.unseen:.1e} at most, count as one)"
    yield "KL divergence", f"mean {_number(found.kl_mean)} ± {_number(found.kl_error)}, max {_number(found.kl_max)}{bound}"
    yield "percentiles", " · ".join(f"{of:g} % {_number(value)}" for of, value in found.kl_percentiles.items())
    yield "same first choice", f"{100 * (found.same_top or 0):.3f} %, first five shared {100 * (found.top_k or 0):.3f} %"
    yield "Δp of the text", f"mean {100 * (found.delta_p_mean or 0):+.4f} %, RMS {100 * (found.delta_p_rms or 0):.4f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.6f}" if value >= 1e-3 else f"{value:.2e}"


def _worst(worst: Worst) -> list[tuple[str, str]]:
    return [
        ("worst", f"chunk {worst.chunk}, position {worst.position}: KL {_number(worst.kl)}"),
        ("after", f"…{clean(worst.before)}"),
        ("text", f"{worst.token} {clean(repr(worst.text))}"),
        ("ours", _choices(worst.ours)),
        ("base", _choices(worst.base)),
    ]


def _choices(top: Sequence[tuple[int, float]]) -> str:
    return "  ".join(f"{number} {value:.4f}" for number, value in top)


def as_json(found: Scored) -> dict[str, Any]:
    """Every figure; `perplexity` and `kl` as the contract has them."""
    worst = found.worst
    return {
        "schema": 1,
        "side": found.side,
        "base": found.base,
        "model": found.model,
        "text": found.text,
        "tokens": found.tokens,
        "context": found.context,
        "chunks": found.chunks,
        "positions": found.positions,
        "perplexity": {
            "ours": plain(found.perplexity),
            "error": plain(found.perplexity_error),
            "base": plain(found.base_perplexity),
        },
        "kl": None
        if found.kl_mean is None
        else {
            "mean": found.kl_mean,
            "error": found.kl_error,
            "max": found.kl_max,
            "percentiles": {f"{of:g}": value for of, value in found.kl_percentiles.items()},
            "exact": found.exact,
            "unseen": found.unseen,
        },
        "same_top": found.same_top,
        "top_k": found.top_k,
        "delta_p": None if found.delta_p_mean is None else {"mean": found.delta_p_mean, "rms": found.delta_p_rms},
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
        "seconds": round(found.seconds, 3),
        "notes": list(found.notes),
    }


def markdown(found: Scored) -> str:
    """One block to paste; ends with a line break."""
    rows = [f"| {name} | {value} |" for name, value in figures(found)]
    against = f" against {clean(found.base)}" if found.base else ""
    return "\n".join(
        [
            f"**{clean(found.side)}**{against}: `{clean(found.model)}` on `{clean(found.text)}`, {_scored(found)}",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
        ]
    )
