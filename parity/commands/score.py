"""`parity score`: perplexity, and the distance of two sides' predictions over a text."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError

from . import options as o


class ScoreFormat(StrEnum):
    """How a score is printed."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


_TEXT = "Use --text FILE, or --golden FOLDER for the prompts recorded there."


@o.fills("model", "command", "scored_server", "mode", "backend", "devices", "threads", "compute", "mapping", "verbose")
def score(
    given: o.Given,
    invocation: typer.Context,
    text: Annotated[
        Path | None, typer.Option("--text", help="UTF-8 text to predict, such as wiki.test.raw.", show_default=False)
    ] = None,
    golden: Annotated[
        Path | None,
        typer.Option(
            "--golden",
            help="Instead of --text and a base: golden dumps (`parity drift record`) whose logits are whole rows.",
            show_default=False,
        ),
    ] = None,
    side: Annotated[
        o.SideChoice | None,
        typer.Option("--side", help="ours (default), or ref: llama.cpp itself, for instance to see what --mode native loses."),
    ] = None,
    base: Annotated[Path | None, typer.Option("--base", help="Compare with this base file of an earlier --save-base.")] = None,
    base_model: Annotated[
        Path | None,
        typer.Option("--base-model", help="Compare with llama.cpp on this GGUF file, for instance the F16 original."),
    ] = None,
    save_base: Annotated[
        Path | None,
        typer.Option(
            "--save-base", help="Write the predictions to a base file: the largest logits of each one and the sum over all."
        ),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Perplexity only, without a base.")] = False,
    context: Annotated[
        int, typer.Option("--context", min=1, help="Tokens in a chunk; the second half of each chunk is scored.")
    ] = 512,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="Largest number of chunks to score.")] = None,
    explain_worst: Annotated[
        bool,
        typer.Option(
            "--explain-worst", help="Run both sides up to the worst position and look for the layer, operation and cause."
        ),
    ] = False,
    output_format: Annotated[
        ScoreFormat, typer.Option("--format", help="text for people, json, or markdown to paste into a pull request.")
    ] = ScoreFormat.TEXT,
) -> None:
    """Perplexity, KL divergence and same-top rate of an engine, a server, our engine or llama.cpp in native mode over a text.

    The base is llama.cpp in exact mode on the same model, --base-model, a --base file, or --golden dumps. The figures are defined as in
    llama-perplexity --kl-divergence, and computed from a few rows of logits at a time. A server lists its most probable tokens only: KL is
    then a lower bound.

      parity score --text t.txt -m M.gguf --exec "./e {model} {tokens} {out}"

      parity score --text t.txt -m Q4.gguf --base-model F16.gguf --side ref

      parity score --text t.txt -m M.gguf --server http://127.0.0.1:8080

      parity score --golden golden --exec "./engine {model} {tokens} {out}"

    Exits 0 whatever the figures are; with --explain-worst, 1 if the worst position is a divergence.
    """
    from ..run.request import Request
    from ..run.sides import EXEC, OURS
    from ..score.score import ScoreRequest
    from ..score.score import score as run
    from .score_output import answer, check_explained, opened_server, show_progress, with_golden_model

    server, command = given.pop("server"), given["command"]
    sides = [given_side for given_side in (command, side, server) if given_side is not None]
    bases = [named for named in (base, base_model, golden, alone or None) if named is not None]
    mixtures = (  # whether it was asked for, what is wrong with it, what to do
        (len(sides) > 1, "more than one side was given.", "Use one of --exec, --server and --side."),
        (text is None and golden is None, "no text was given.", _TEXT),
        (text is not None and golden is not None, "both --text and --golden were given.", _TEXT),
        (len(bases) > 1, "more than one base was given.", "Use one of --base, --base-model, --golden and --alone."),
        (
            save_base is not None and (server is not None or golden is not None),
            "--save-base needs whole rows of logits over a text.",
            "Leave it out with --server and with --golden.",
        ),
        (explain_worst and alone, "--explain-worst needs a base.", "Leave --alone out."),
    )
    for mixed, problem, advice in mixtures:
        if mixed:
            raise InputError(problem, advice, code="usage")
    if golden is not None:
        o.refuse_unused(invocation, "context", "is for a text", "Golden prompts are scored whole: leave it out.")
        given = with_golden_model(given, golden)
    if sides and side is not o.SideChoice.OURS:
        searched = command is not None and explain_worst  # the cause, by that engine
        o.refuse_unused(invocation, "devices" if searched else "backend devices", "is for the engine that comes with parity")
    if command is None:
        o.refuse_unused(invocation, "names offset compute", "is for an engine of yours", "Give its command with --exec.")
    source = EXEC if command is not None else (side.value if side is not None else OURS)
    opened = None if server is None else opened_server(server, given["model"])
    request = ScoreRequest(Request(**given), text, source, context, chunks, base, base_model, save_base, alone, golden, opened)
    if explain_worst:
        check_explained(source)
    scored, leading = run(request, show_progress)
    raise typer.Exit(answer(scored, output_format.value, request, server, leading if explain_worst else ()))
