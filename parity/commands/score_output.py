"""What `parity score` prints, and the comparison at the worst position."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from checkpoints.errors import InputError, ParityError

from .options import Format
from .output import DIVERGENCE_CODE, PARITY_CODE

if TYPE_CHECKING:
    from checkpoints.answers.score import Scored
    from checkpoints.answers.server import ServerAnswer
    from reference.client import Reference

    from ..run.request import Request
    from ..score.predictions import Predictor
    from ..score.score import ScoreRequest
    from ..server.session import ServerRequest


def show_progress(done: int, total: int, perplexity: float) -> None:
    """One line on stderr that each chunk replaces, if that is a terminal."""
    _replace_line(f"chunk {done} of {total}, perplexity {perplexity:.4f}", end="\n" if done == total else "")


def show_requests(_: str, done: int, total: int | None) -> None:
    """The requests of a chunk in the same line, if stderr is a terminal: a server that does not echo gets one for each position."""
    _replace_line(f"request {done} of {total}")


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()


def _replace_line(text: str, end: str = "") -> None:
    if on_terminal():
        print(f"\r{text} \x1b[K", end=end, file=sys.stderr, flush=True)


def answer(
    scored: "Scored", output_format: str, request: "ScoreRequest", server: "ServerRequest | None", leading: tuple[int, ...]
) -> int:
    """Print the figures, and what explains the position that the ids `leading` lead to, if there are any; the exit code."""
    if not leading:
        show(scored, output_format)
        return PARITY_CODE
    if output_format == "text":
        show(scored, output_format)
        return explained(request.run, request.source, leading, server)
    try:
        at_worst, code = explained_quietly(request.run, request.source, leading, server)
    except ParityError as error:  # the figures, which may have taken hours, are printed nevertheless
        at_worst = {"error": {"code": error.code, "message": error.message, "advice": error.advice}}
        code = error.exit_code
    show(scored, output_format, at_worst)
    return code


def show(score: "Scored", output_format: str, explained: "dict[str, Any] | None" = None) -> None:
    """Print the figures; `explained` is what was found at the worst position."""
    from reports import score as report

    if output_format == "json":
        print(json.dumps(report.as_json(score) | ({} if explained is None else {"explained": explained})))
    elif output_format == "markdown":
        print(report.markdown(score, explained), end="")
    else:
        from rich.console import Console

        from reports.header import print_lines

        console = Console()
        print_lines(console, list(report.lines(score, console.width)))


def check_explained(source: str) -> None:
    """Refuse to explain llama.cpp by llama.cpp.

    Raises:
        InputError: the side is llama.cpp itself, which is the reference.
    """
    from ..run.sides import REF

    if source == REF:
        raise InputError(
            "--explain-worst leads from your engine (or ours) to an operation.",
            "`parity isolate` judges llama.cpp's own.",
            code="usage",
        )


def with_golden_model(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same request with the model of golden dumps, if none was named.

    Raises:
        InputError: the folder is not one of golden dumps, or its model is another one or not there.
    """
    from ..drift.golden import load
    from ..models import embedded

    return given | {"model": load(folder).model_path(None if given["model"] == embedded.path() else given["model"])}


def opened_server(server: "ServerRequest", model: Path) -> "Callable[[Reference, int], Predictor]":
    """What makes a server a side of a score."""
    from ..server.scoring import ServerPredictions

    return partial(ServerPredictions, server, model, progress=show_requests)


def explained(run: "Request", source: str, leading: tuple[int, ...], server: "ServerRequest | None" = None) -> int:
    """Run both sides along the tokens that lead to the worst position, print what is found, and return the exit code."""
    from ..run.sides import EXEC

    request = _along(run, leading)
    if server is not None:
        from reports import server as room

        from .output import answer as shown

        print()
        return shown(_server_there(request, server), room, Format.TEXT)
    if source == EXEC:
        from reference.client import Reference

        from .hunt_output import hunted

        return hunted(request, Reference(threads=run.threads, verbose=run.verbose), Format.TEXT)
    from ..run.session import run as compared
    from .comparison_output import finish

    print()
    return finish(compared(replace(request, points="all")), Format.TEXT)


def explained_quietly(
    run: "Request", source: str, leading: tuple[int, ...], server: "ServerRequest | None" = None
) -> "tuple[dict[str, Any], int]":
    """The same as JSON, with the exit code."""
    from ..run.sides import EXEC

    request = _along(run, leading)
    if server is not None:
        from reports import server as room

        verdict = _server_there(request, server)
        return room.as_json(verdict), PARITY_CODE if verdict else DIVERGENCE_CODE
    if source == EXEC:
        from reference.client import Reference

        from .hunt_output import hunted_quietly

        reference = Reference(threads=run.threads, verbose=run.verbose)
        result, answer = hunted_quietly(request, reference, Format.JSON)
        return answer, PARITY_CODE if result.hunt else DIVERGENCE_CODE
    from reports.as_json import verdict_as_json

    from ..run.session import run as compared

    outcome = compared(replace(request, points="all"))
    return verdict_as_json(outcome.verdict) | {"folder": str(outcome.folder)}, (
        PARITY_CODE if outcome.verdict else DIVERGENCE_CODE
    )


def _server_there(request: "Request", server: "ServerRequest") -> "ServerAnswer":
    """The server's predictions up to the worst position and what explains them; it is asked as `parity run --server` does, by text."""
    from reference.client import Reference

    from ..server.scoring import text_of
    from ..server.session import compare_server

    with Reference(threads=request.threads, verbose=request.verbose) as reference:
        text = text_of(request.tokens or (), request.model, reference)
        return compare_server(replace(request, prompt=text, tokens=None), server, reference=reference)


def _along(run: "Request", leading: tuple[int, ...]) -> "Request":
    return replace(run, tokens=leading, positions="all")
