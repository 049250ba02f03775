"""A running server beside llama.cpp: ask it, compute the same positions, compare, look for the cause, point to the checkpoints."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace

from checkpoints.answers.server import GREEDY, TEACHER_FORCED, Predicted, ServerAnswer, ServerCause
from checkpoints.errors import InputError
from checkpoints.structs import as_dict
from checkpoints.whole_file import put
from reference.client import Reference
from reference.jobs import Tokens

from ..run.one_side import dump_reference
from ..run.request import Prompt, Request
from ..run.results import dumps_of
from ..run.session import REF_FILE, resolve_prompt, run_folder
from ..score.measures import largest, log_sum
from . import choices
from .ask import PlacedPrediction, Progress, ServerReply, ask_server
from .base import Row, floor_of, kl, listed, rows
from .case import ServerCase
from .causes import cause_of, unexplained
from .dialects import AUTO, Dialect, dialect_of
from .http import Connection
from .limits import LEAST_LIMIT, limit_of
from .predictions import require_logarithms
from .sample import Sample
from .vocabulary import Vocabulary

SERVER_FILE = "server.json"


class ServerRequest(Struct, frozen=True):
    """How the server is asked: `top` candidates per position, `extra` members of every request's JSON, `model` its name there."""

    connection: Connection
    api: str = AUTO
    top: int = 5
    model: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    dump_prefix: bool = False


def compare_server(
    request: Request, wanted: ServerRequest, progress: Progress | None = None, reference: Reference | None = None
) -> ServerAnswer:
    """Ask the server for its predictions over the prompt and `request.generate` choices of its own, and compare them with llama.cpp's.

    `reference` is a running llama.cpp; else one is started.

    Raises:
        ServerError: the server cannot be reached, or its answer cannot be used. InputError, ModelError: the prompt or model is unusable.
    """
    began = perf_counter()
    connection = wanted.connection
    with ExitStack() as stack:
        if reference is None:
            reference = stack.enter_context(Reference(verbose=request.verbose, threads=request.threads))
        prompt = resolve_prompt(reference, request.model, request.prompt, request.tokens)
        folder = stack.enter_context(run_folder(request))
        special = reference.tokenize(request.model, "a")
        vocabulary = Vocabulary(reference.pieces(request.model, range(special.n_vocab)))
        given: str | Sequence[int] = prompt.text if prompt.text is not None else prompt.ids
        dialect = dialect_of(connection, wanted.api, wanted.top, wanted.model, wanted.extra, given)
        reply = ask_server(
            dialect, prompt, vocabulary, lambda text: reference.tokenize(request.model, text).ids, request.generate, progress
        )
        if not reply.placed and reply.around is None and reply.tokenizer is None:
            raise InputError(
                "the server gave no candidates that could be compared.", "Request more with --server-top.", code="server"
            )
        if progress is not None:
            progress("llama.cpp", 0, None)
        answer = _compared(reference, request, prompt, reply, special, vocabulary, dialect)
        if not answer.causes:
            require_logarithms((item for placed in reply.placed for item in placed.candidates), connection.name)
    answer = replace(answer, requests=connection.requests, folder=str(folder), url=connection.name)
    with dumps_of(folder) as dumps:  # an earlier run's are replaced, asked for or not
        if wanted.dump_prefix and answer.prefix:
            dumped = replace(
                request, prompt=None, tokens=answer.prefix, points="all" if request.points == "default" else request.points
            )
            dump_reference(dumped, dumps / REF_FILE)
    answer = replace(answer, seconds=perf_counter() - began)
    put(folder / SERVER_FILE, (json.dumps(as_dict(answer), indent=1, allow_nan=False) + "\n").encode())
    return answer


class _Beside(Struct, frozen=True):
    """The server's predictions beside llama.cpp's.

    `sample` is what causes are tried on; `greedy` are the server's own choices with llama.cpp's rows, which are empty from the 65th on.
    `unknown` counts predictions of which no candidate is a token; `next_choice` is what llama.cpp chooses where the server stopped early.
    """

    predictions: tuple[Predicted, ...] = ()
    sample: tuple[tuple[PlacedPrediction, Row], ...] = ()
    greedy: tuple[tuple[PlacedPrediction, Row], ...] = ()
    limit: float = LEAST_LIMIT
    floor: float = 0.0
    unknown: int = 0
    next_choice: int | None = None


def _beside_llama_cpp(reference: Reference, request: Request, reply: ServerReply, vocabulary: Vocabulary) -> _Beside:
    by_position = {placed.position: placed for placed in reply.placed}
    if not by_position:
        return _Beside()
    ended = _ended(reply)
    first, tokens = min(by_position), reply.tokens[: max(by_position) + 1 + ended]
    floor = floor_of(reference, request.model, tokens, first)
    limit = request.tolerance if request.tolerance is not None else limit_of(floor)
    predictions: list[Predicted] = []
    sample = Sample(reply.placed)
    greedy: list[tuple[PlacedPrediction, Row]] = []
    unknown = 0
    next_choice: int | None = None
    for position, row in rows(reference, request.model, tokens, first, request.mode):
        if ended and position == len(reply.tokens) - 1:
            next_choice = int(row.argmax())
        placed = by_position.get(position)
        if placed is None:
            continue
        if not len(listed(placed.candidates, vocabulary, row).ids):
            unknown += 1
            continue
        predictions.append(_predicted(placed, row, reply, vocabulary, limit))
        sample.add(placed, row, wrong=predictions[-1].wrong)
        if placed.chosen is not None:
            greedy.append((placed, row.copy() if len(greedy) < 64 else row[:0]))
    if unknown and not predictions:
        raise InputError(
            "none of the server's candidates is a token of this model.",
            "Is it the model that the server runs? Check --model.",
            code="server",
        )
    return _Beside(tuple(predictions), sample.kept, tuple(greedy), limit, floor.worst, unknown, next_choice)


def _cause(case: ServerCase, beside: _Beside, unfaithful: Sequence[tuple[int, str, str]], *, wrong: bool) -> ServerCause | None:
    """What explains the server's numbers or, if those are right, its choices."""
    reply = case.reply
    cause = cause_of(case) if wrong or reply.around or reply.tokenizer else None
    if cause is None and unfaithful:
        return choices.cause([item for item in beside.greedy if len(item[1])], reply.tokens, unfaithful, case.vocabulary)
    return cause


def _compared(
    reference: Reference,
    request: Request,
    prompt: Prompt,
    reply: ServerReply,
    special: Tokens,
    vocabulary: Vocabulary,
    dialect: Dialect,
) -> ServerAnswer:
    beside = _beside_llama_cpp(reference, request, reply, vocabulary)
    predictions = beside.predictions
    notes = [*reply.notes, *_fewer(reply, beside.next_choice, special, vocabulary, min(dialect.top, special.n_vocab))]
    if beside.unknown:
        notes.append(f"predictions left out, because none of their candidates is a token of this model: {beside.unknown}")
    wrong = next((item for item in predictions if item.wrong), None)
    other = next((item for item in predictions if not item.same_choice), None)
    case = ServerCase(reference, request.model, request.mode, prompt, reply, special, vocabulary, beside.sample, beside.limit)
    unfaithful = choices.unfaithful([placed for placed, _ in beside.greedy])
    cause = _cause(case, beside, unfaithful, wrong=wrong is not None)
    if wrong is not None and cause is None:
        note = unexplained(len(predictions), sum(item.same_choice for item in predictions))
        notes += [note] if note else []
    place = wrong or other
    prefix = reply.tokens[: place.position + 1] if place is not None else ()
    return ServerAnswer(
        url="",
        api=dialect.name,
        model=request.model.name,
        mode=request.mode,
        prompt=reply.prompt,
        tokens=reply.tokens,
        predictions=predictions,
        limit=beside.limit,
        floor=beside.floor,
        echoed=reply.echoed,
        requests=0,
        seconds=0.0,
        first=wrong,
        first_choice=other,
        causes=(cause,) if cause is not None else (),
        unfaithful=unfaithful,
        prefix=prefix,
        wanted=reply.wanted,
        next_command=_next(request.model, prefix) if wrong is not None else "",
        notes=(*notes, *case.notes),
    )


def _ended(reply: ServerReply) -> bool:
    """Whether the server chose fewer tokens than it was asked for."""
    return len(reply.tokens) - reply.prompt < reply.wanted


def _fewer(reply: ServerReply, next_choice: int | None, special: Tokens, vocabulary: Vocabulary, top: int) -> Iterator[str]:
    """Notes on tokens and candidates that the server was asked for and did not give."""
    chosen = len(reply.tokens) - reply.prompt
    if _ended(reply):
        why = f", and says {reason!r}" if (reason := reply.stopped[:40]) else ""
        if next_choice is None:
            then = ""
        elif next_choice == special.eos:
            then = "; llama.cpp, too, ends the text there"
        else:
            then = f"; llama.cpp would go on with {vocabulary.pieces[next_choice]!r}"
        yield f"the server chose {chosen} of the {reply.wanted} tokens that it was asked for{why}{then}"
    most = max((len(placed.candidates) for placed in reply.placed), default=top)
    if most < top:
        yield f"the server gives {most} candidates per position, not the {top} that it was asked for"


def _predicted(placed: PlacedPrediction, row: Row, reply: ServerReply, vocabulary: Vocabulary, limit: float) -> Predicted:
    server = listed(placed.candidates, vocabulary, row)
    total = log_sum(row)
    pieces = vocabulary.pieces
    top = largest(row, max(len(placed.candidates), 2))
    known = {int(number): float(value) for number, value in zip(server.ids, server.logprobs, strict=True)}
    shown = [(vocabulary.most_probable(item, lambda token_id: float(row[token_id])), item) for item in placed.candidates]
    in_text = placed.position + 1 < reply.prompt
    follows = reply.tokens[placed.position + 1] if placed.position + 1 < len(reply.tokens) else -1
    server_choice = next((number for number, _ in shown[:1] if number is not None), None)
    distance = kl(row, server)
    return Predicted(
        placed.position,
        pieces[reply.tokens[placed.position]],
        TEACHER_FORCED if in_text else GREEDY,
        distance,
        tuple((-1 if number is None else number, item.text, max(item.logprob, -1e4)) for number, item in shown),
        tuple((int(number), pieces[int(number)], float(row[number]) - total) for number in top),
        follows,
        known.get(follows, _own(placed)),
        float(row[follows]) - total if follows >= 0 else None,
        float(row[top[0]] - row[server_choice]) if server_choice is not None else 0.0,
        wrong=not np.isfinite(distance) or distance > limit,
    )


def _own(placed: PlacedPrediction) -> float | None:
    return max(placed.own.logprob, -1e4) if placed.own is not None else None


def _next(model: Path, prefix: Sequence[int]) -> str:
    """The command that records every point of llama.cpp on these tokens."""
    tokens = ",".join(map(str, prefix))
    return shlex.join(["parity", "dump", "ref", "--model", str(model), "--tokens", tokens, "--points", "all", "-o", REF_FILE])
