"""A cell of a server: it is started for the model, asked for its log-probabilities over a text and, to decode, for its own choices."""

import json
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.conform import DIVERGENCE, PARITY, TIMED_OUT, UNUSABLE, Cell, CellResult
from checkpoints.answers.server import ServerAnswer
from checkpoints.points import LOGITS
from reference.client import Reference

from ..run.request import Request
from ..run.served import ServedModel
from ..server.http import Connection, ServerError
from ..server.session import SERVER_FILE, ServerRequest, compare_server
from .matrix import DECODE, PREFILL

MODES = (PREFILL, DECODE)  # the text's own tokens; and those that the server chooses after them
_CHOSEN = 8  # tokens in DECODE
# Servers get texts, which they tokenize themselves, special tokens included. The names are those of matrix.PROMPTS.
TEXTS = {
    "short": "Once upon a time, there was",
    "long": "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One day, she found a big "
    "red ball in the park and took it home to her mom.",
    "one": "Once",
    "same": "the the the the the the the the the",
}


class Asking(Struct, frozen=True):
    """How servers are asked: the dialect, and a JSON object whose members go into every request."""

    api: str
    members: str = ""


def served_cell(
    cell: Cell, request: Request, server: ServedModel, asking: Asking, reference: Reference, folder: Path
) -> CellResult:
    """The cell's result; the server runs on, for the model's other cells.

    Raises:
        EngineError: the server cannot be started, or ended.
    """
    url = server.url(request.model)
    name = f"served/{cell.name.replace(' ', '-')}"
    run_request = replace(
        request,
        prompt=TEXTS[cell.prompt],
        tokens=None,
        generate=_CHOSEN if cell.mode == DECODE else 0,
        out=folder / name,
    )
    connection = Connection(url, timeout=server.timeout)
    extra = json.loads(asking.members) if asking.members else {}
    try:
        answer = compare_server(run_request, ServerRequest(connection, asking.api, extra=extra), reference=reference)
    except ServerError as error:
        if (how := server.ended()) is not None:
            raise how from error
        return CellResult(cell, TIMED_OUT if error.late else UNUSABLE, error.message.replace(connection.name, "the server"))
    return _result(cell, answer, f"{name}/{SERVER_FILE}")


def _result(cell: Cell, answer: ServerAnswer, report: str) -> CellResult:
    worst = max(answer.predictions, key=lambda prediction: prediction.kl, default=None)
    first = answer.first or answer.first_choice
    result = CellResult(
        cell,
        PARITY if answer else DIVERGENCE,
        compared=len(answer.predictions),
        of_limit=None if worst is None else answer.of_limit(worst),
        worst="" if worst is None else LOGITS,
    )
    if answer:
        return result
    cause = answer.causes[0] if answer.causes else None
    kind = "a choice that is not the most probable" if answer.first is None else f"a prediction of {answer.first.kind}"
    return replace(
        result,
        checkpoint=LOGITS,
        token_idx=first.position if first is not None else answer.unfaithful[0][0] if answer.unfaithful else 0,
        cause=cause.name if cause is not None else kind,
        sentence=cause.sentence if cause is not None else "",
        report=report,
    )
