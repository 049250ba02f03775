"""A server beside llama.cpp, as text and as JSON."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.text import Text

from checkpoints.answers.server import GREEDY, Predicted, ServerAnswer, ServerCause
from checkpoints.printable import printable
from checkpoints.structs import as_dict

from .as_json import plain
from .layout import columns, labelled
from .numbers import clean, count, error, of_limit, ranges

_LABEL = 8  # width of the names in front of sentences
_SHOWN = 5  # candidates of each side
_ROW = 4  # predictions of a row, at the least
_PARTS = 6  # rows of the table: enough to see a drift grow, few enough for one look


def lines(server_answer: ServerAnswer, width: int) -> Iterator[Text]:
    """Who was compared, how far they are apart along the text, the first wrong prediction and its cause."""
    how_asked = "one request echoed the text" if server_answer.echoed else "one request a position"
    generated = len(server_answer.tokens) - server_answer.prompt
    yield from labelled(
        [
            (
                "server",
                f"{clean(server_answer.url)} · {clean(server_answer.api)} · {how_asked}, {count(server_answer.requests, 'request')}",
            ),
            ("ref", f"llama.cpp · {clean(server_answer.model)} · {server_answer.mode}"),
            (
                "tokens",
                f"{count(server_answer.prompt, 'token')} of text"
                + (f", {generated} chosen by the server" if generated else "")
                + (f" of {server_answer.wanted} that it was asked for" if generated < server_answer.wanted else ""),
            ),
        ],
        width,
    )
    yield Text("")
    if server_answer.predictions:
        yield from _table(server_answer, width)
        yield Text("")
    rows: list[tuple[str, str]] = []
    if server_answer.first is not None:
        rows += _place(server_answer.first, width - _LABEL)
    if server_answer.first_choice is not None:
        rows.append(("choice", _choice(server_answer.first_choice)))
    for cause in server_answer.causes:
        rows += cause_lines(cause)
    if server_answer.next_command:
        rows.append(("next", printable(server_answer.next_command, 2000)))
    yield from labelled(rows, width, label=_LABEL)
    yield from (Text(f"note  {clean(note)}", style="dim") for note in server_answer.notes)
    yield Text(sentence(server_answer), style="bold")
    yield Text(f"{clean(server_answer.folder)}/   {server_answer.seconds:.1f} s", style="dim")


def _table(server_answer: ServerAnswer, width: int) -> list[Text]:
    rows: list[tuple[str, ...]] = [("positions", "predictions", "mean KL", "worst KL", "of limit", "same choice", "at")]
    styles = ["dim"]
    groups = [
        [item for item in server_answer.predictions if item.kind != GREEDY],
        [item for item in server_answer.predictions if item.kind == GREEDY],
    ]
    for group in groups:
        for part in _split(group, _PARTS):
            worst = max(part, key=lambda item: item.kl)
            rows.append(
                (
                    ranges(tuple(range(part[0].position, part[-1].position + 1)))
                    + (" greedy" if part[0].kind == GREEDY else ""),
                    str(len(part)),
                    error(float(np.mean([item.kl for item in part]))),
                    error(worst.kl),
                    of_limit(server_answer.of_limit(worst)),
                    f"{sum(item.same_choice for item in part)}/{len(part)}",
                    f"{worst.position} {clean(repr(worst.before))}",
                )
            )
            styles.append("red" if any(item.wrong for item in part) else "")
    return columns(rows, frozenset({1, 2, 3, 4, 5}), styles, width)


def _split(items: Sequence[Predicted], parts: int) -> list[Sequence[Predicted]]:
    parts = min(parts, max(len(items) // _ROW, 1))
    edges = sorted({number * len(items) // parts for number in range(parts + 1)})
    return [items[a:b] for a, b in pairwise(edges)]


def _place(item: Predicted, width: int) -> Iterator[tuple[str, str]]:
    yield "first", f"position {item.position}, after {clean(repr(item.before))}: KL {error(item.kl)}"
    yield "server", _candidates(item.server, width)
    yield "ref", _candidates(item.ref, width)


def _choice(item: Predicted) -> str:
    """The first position at which the two would continue differently."""
    our_token, server_token = item.ref[0], item.server[0]
    return (
        f"the choices differ first at position {item.position}: llama.cpp {clean(repr(our_token[1]))}, the server "
        f"{clean(repr(server_token[1]))}, which llama.cpp has {item.margin:.3g} below its own, in log-probability"
    )


def _candidates(top: Sequence[tuple[int, str, float]], width: int) -> str:
    """The most probable tokens, as many as fit into a line."""
    shown = ""
    for _, text, value in top[:_SHOWN]:
        longer = f"{shown}  {clean(repr(text))} {value:.4f}".strip()
        if shown and cell_len(longer) > width:
            break
        shown = longer
    return shown


def cause_lines(cause: ServerCause) -> Iterator[tuple[str, str]]:
    """A cause with how well it explains the server's numbers, and what to do."""
    yield "cause", f"{cause.name}: {printable(cause.sentence, 600)}"
    if cause.kl is not None:
        yield (
            "",
            f"read this way, {cause.tried} predictions have a worst KL of {error(cause.kl)}, as requested {error(cause.without)}",
        )
    yield "do", clean(cause.advice)


def sentence(server_answer: ServerAnswer) -> str:
    """The answer in one line."""
    total = len(server_answer.predictions)
    same = sum(item.same_choice for item in server_answer.predictions)
    agreement = f"first choices the same at {same} of {total}; limit KL {error(server_answer.limit)}"
    chosen = len(server_answer.tokens) - server_answer.prompt
    if chosen < server_answer.wanted:
        agreement += f"; the server chose {chosen} of {server_answer.wanted} tokens"
    if server_answer:
        return f"parity: {total} of {total} predictions agree, {agreement}"
    wrong = sum(item.wrong for item in server_answer.predictions)
    if server_answer.first is not None:
        return (
            f"divergence: {wrong} of {total} predictions differ, from position {server_answer.first.position} on; {agreement}"
        )
    if server_answer.unfaithful:
        choices = count(len(server_answer.unfaithful), "choice")
        verb = "is" if len(server_answer.unfaithful) == 1 else "are"
        return f"divergence: the predictions agree, but {choices} {verb} not the most probable token; {agreement}"
    return f"divergence: the server reads another text; {agreement}"


def as_json(server_answer: ServerAnswer) -> dict[str, Any]:
    """The whole answer."""

    def prediction(item: Predicted | None) -> dict[str, Any] | None:
        return None if item is None else as_dict(item) | {"same_choice": item.same_choice}

    answer = as_dict(server_answer) | {
        "schema": 1,
        "verdict": "parity" if server_answer else "divergence",
        "compared": len(server_answer.predictions),
        "predictions": [prediction(item) for item in server_answer.predictions],
        "first_divergence": prediction(server_answer.first),
        "first_choice": prediction(server_answer.first_choice),
        "answer": sentence(server_answer),
    }
    del answer["first"]
    return {key: plain(value) for key, value in answer.items()}
