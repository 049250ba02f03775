"""`parity score`: perplexity, and the distance of two sides' predictions over a text."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from checkpoints.errors import InputError, ParityError

from . import options as o


class ScoreFormat(StrEnum):
    """How a score is printed."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


@o.fills("model", "command", "mode", "backend", "devices", "threads", "compute", "mapping", "verbose")
def score(
    given: o.Given,
    invocation: typer.Context,
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text to predict, such as wiki.test.raw.", show_default=False)],
    side: Annotated[
        o.Side | None,
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
    """Perplexity, KL divergence and same-top rate of your engine (or ours, or llama.cpp in native mode) over a text.

    The base is llama.cpp in exact mode on the same model, --base-model, or a --base file. The figures are defined as in
    llama-perplexity --kl-divergence, and take one row of logits at a time.

      parity score --text wiki.test.raw --model M.gguf --exec "./engine {model} {tokens} {out}"

      parity score --text wiki.test.raw --model M-Q4_K_M.gguf --base-model M-F16.gguf --side ref --mode native

    Exits 0 whatever the figures are; with --explain-worst, 1 if the worst position is a divergence.
    """
    from ..run.request import Request
    from ..run.sides import EXEC, OURS
    from ..score.score import ScoreRequest
    from ..score.score import score as run
    from .score_output import check_explained, explained, explained_quietly, show

    if sum(chosen is not None for chosen in (given["command"], side)) > 1:
        raise InputError("Both --exec and --side were given.", "Take one of them.", code="usage")
    if sum((base is not None, base_model is not None, alone)) > 1:
        raise InputError("more than one base was given.", "Take one of --base, --base-model and --alone.", code="usage")
    if explain_worst and alone:
        raise InputError("--explain-worst needs a base.", "Leave --alone out.", code="usage")
    if given["command"] is not None or side is o.Side.REF:
        o.refuse_unused(invocation, "backend devices", "is for the engine that comes with parity")
    if given["command"] is None:
        o.refuse_unused(invocation, "names offset compute", "is for an engine of yours", "Give its command with --exec.")
    source = EXEC if given["command"] is not None else (side.value if side is not None else OURS)
    request = ScoreRequest(Request(**given), text, source, context, chunks, base, base_model, save_base, alone)

    def progress(done: int, total: int, perplexity: float) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rchunk {done} of {total}, perplexity {perplexity:.4f} ", end=end, file=sys.stderr, flush=True)

    if explain_worst:
        check_explained(source)
    scored, leading = run(request, progress)
    code = 0
    answer: dict[str, Any] | None = None
    if explain_worst and leading and output_format is not ScoreFormat.TEXT:
        try:
            answer, code = explained_quietly(request.run, source, leading)
        except ParityError as error:  # the figures, which may have taken hours, are printed nevertheless
            answer = {"error": {"code": error.code, "message": error.message, "advice": error.advice}}
            code = error.exit_code
    show(scored, output_format.value, answer)
    if explain_worst and leading and output_format is ScoreFormat.TEXT:
        code = explained(request.run, source, leading)
    raise typer.Exit(code)
