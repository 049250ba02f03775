"""A check against golden dumps as text and as JSON."""

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from checkpoints.answers.drift import Drift, Margin

from .as_json import SCHEMA, plain, verdict_as_json
from .layout import columns, labelled
from .limits import assumed
from .numbers import clean, count, error, of_limit
from .terminal import explanation

_ROWS = 24  # points that are listed; of more, those nearest to their limits


def shown_margin(value: float | None) -> str:
    """A margin: "–" where there is no error, "360 ×", "exceeded" beyond the limit."""
    if value is None:
        return "–"
    if value < 1:
        return "exceeded"
    return f"{float(f'{value:.2g}'):,.0f} ×" if value >= 10 else f"{value:.2g} ×"


def lines(drift: Drift, width: int) -> Iterator[Text]:
    """The whole answer for a terminal of `width` columns."""
    yield from labelled([("golden", clean(drift.golden)), ("checked", clean(drift.side))], width)
    yield Text("")
    yield from _table(drift.points, width)
    yield Text("")
    for item in drift.checked:
        if not item.verdict:
            yield Text(f"prompt {clean(shortened(item.prompt))}", style="bold")
            yield from explanation(item.verdict, width)
            yield Text("")
    yield from labelled(list(remarks(drift)), width)
    yield Text(sentence(drift), style="bold green" if drift else "bold red")


def sentence(drift: Drift) -> str:
    """The answer in one line."""
    prompts = count(len(drift.checked), "prompt")
    if drift.updated:
        return f"updated: {count(len(drift.updated), 'golden point')} rewritten, as shown above"
    if not drift:
        wrong = sum(not item.verdict for item in drift.checked)
        moved = sorted({point.checkpoint for item in drift.checked for point in item.verdict.points if point.failed})
        where = f": {len(moved)} of {count(len(drift.points), 'point')} moved beyond their limits" if moved else ""
        return f"drift in {wrong} of {prompts}{where}"
    nearest = max(drift.points, key=lambda point: point.of_limit, default=None)
    room = ""
    if nearest is not None and nearest.margin is not None:
        room = f"; narrowest margin {shown_margin(nearest.margin)} at {clean(nearest.checkpoint)}"
    limit = " (limit assumed)" if drift.assumed else ""
    return f"no drift{limit}: {count(drift.compared, 'record')} of {prompts} within their limits{room}"


def remarks(drift: Drift) -> Iterator[tuple[str, str]]:
    """Named sentences: which versions changed, which errors grow, what was rewritten."""
    moved = max((point.of_limit for point in drift.points), default=0.0)
    for change in drift.changes:
        before, now = clean(change.before) or "not stated", clean(change.now) or "not stated"
        yield "changed", f"{clean(change.what)} was {before}, is now {now}"
    if drift.changes:
        yield "", f"the numbers {'moved by up to ' + of_limit(moved) + ' of their limits' if moved else 'did not move'}"
    for name, text in dict.fromkeys(how for verdict in drift.assumed for how in assumed(verdict)):
        yield name, text
    for finding in drift.findings:
        yield "finding", clean(finding)
    for number, name in drift.updated:
        yield "rewritten", f"prompt {number}: {clean(name)}"
    for note in drift.notes:
        yield "note", clean(note)


def shortened(text: str) -> str:
    """A prompt in quotes, at most 60 characters of it."""
    return f'"{text if len(text) <= 60 else text[:59] + "…"}"'


def drift_as_json(drift: Drift) -> dict[str, Any]:
    """One JSON object with at least `verdict` and `points` (each with `margin`: how many times larger it may become)."""
    fields: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": drift.verdict,
        "compared": drift.compared,
        "limit_assumed": bool(drift.assumed),
        "golden": drift.golden,
        "side": drift.side,
        "points": [
            {
                "checkpoint": point.checkpoint,
                "nmse": point.nmse,
                "limit": point.limit,
                "of_limit": point.of_limit,
                "margin": point.margin,
                "before": point.before,
                "prompt": point.prompt,
                "token_idx": point.token_idx,
            }
            for point in drift.points
        ],
        "prompts": [
            {"prompt": item.prompt, **{key: value for key, value in verdict_as_json(item.verdict).items() if key != "schema"}}
            for item in drift.checked
        ],
        "changes": [{"what": change.what, "before": change.before, "now": change.now} for change in drift.changes],
        "findings": list(drift.findings),
        "updated": [{"prompt": number, "checkpoint": name} for number, name in drift.updated],
        "notes": list(drift.notes),
    }
    return {key: plain(value) for key, value in fields.items()}


def _table(points: tuple[Margin, ...], width: int) -> list[Text]:
    if not points:
        return []
    shown = sorted(sorted(points, key=lambda point: -point.of_limit)[:_ROWS], key=points.index)
    earlier = any(point.before is not None for point in shown)
    rows: list[tuple[str, ...]] = [("checkpoint", "worst NMSE", "of limit", "margin", *(["was"] if earlier else []), "at")]
    styles = ["dim"]
    for point in shown:
        was = ["" if point.before is None else of_limit(point.before)] if earlier else []
        where = f"prompt {point.prompt}, position {point.token_idx}" if point.of_limit else ""
        rows.append(
            (clean(point.checkpoint), error(point.nmse), of_limit(point.of_limit), shown_margin(point.margin), *was, where)
        )
        styles.append("bold red" if point.of_limit > 1 else "")
    lines = columns(rows, frozenset({1, 2, 3, 4} if earlier else {1, 2, 3}), styles, width)
    hidden = len(points) - len(shown)
    return [*lines, *([Text(f"… {count(hidden, 'further point')} with less", style="dim")] if hidden else [])]
