"""`parity consistency`: compare an engine with itself."""

from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError

from . import options as o


@o.fills(
    "model", "optional_prompt", "command", "all_points", "backend", "threads", "mapping", "compute", "tolerance", "verbose"
)
def consistency(
    given: o.Given,
    context: typer.Context,
    dumps: Annotated[
        list[Path] | None,
        typer.Argument(help="Two dumps of your engine over the same tokens, computed in different portions."),
    ] = None,
    side: Annotated[
        o.SideChoice | None, typer.Option("--side", help="Our engine (ours, the default) or llama.cpp (ref).")
    ] = None,
    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Tokens per chunk when the prefill is checked in chunks.")] = 4,
    output_format: o.FormatOption = o.Format.TEXT,
) -> None:
    """Does an engine agree with itself? The same prompt at once, token by token, in chunks, in ubatches, in a batch, from a saved state.

    Is your first token right and does the text fall apart later? Then prefill and decode disagree: dump the same tokens twice, once
    as one prompt and once token by token, and give both dumps. The failing points tell whether cache, positions or mask are to blame.

      parity consistency whole.jsonl steps.jsonl       two dumps of your engine

      parity consistency -p Hi --exec "./e {model} {tokens} {out} {portions}"

      parity consistency -p Hi --side ref               llama.cpp itself

    {portions} stands for the number of tokens in each forward pass, separated by commas: 4,4,1; {ubatch} for the largest number of tokens
    computed at once; {sequences} for several prompts, 17,403;5,6; {state} for a file: continue from it if it exists, and write the
    state into it. No reference is needed. Exits 0 if all agree, 1 if something differs.
    """
    from ..consistency.consistency import ConsistencyRequest
    from ..consistency.consistency import consistency as check
    from ..run.prompt import given_prompt
    from ..run.request import Request
    from ..run.sides import EXEC, OURS
    from .output import answer, waiting

    if dumps is not None and len(dumps) not in (0, 2):
        raise InputError(
            f"consistency compares two dumps, not {len(dumps)}.", "Give two dumps, or none and --prompt.", code="dumps"
        )
    pair = (dumps[0], dumps[1]) if dumps else None
    if sum(chosen not in (None, False) for chosen in (pair, side, given["command"])) > 1:
        raise InputError("more than one engine was given.", "Use two dumps, --exec or --side.", code="usage")
    if pair is not None:
        computing = "model prompt prompt_file tokens points backend threads chunk verbose"
        o.refuse_unused(context, computing, "has no effect on two dumps: nothing is computed")
    elif side is not None or given["command"] is None:
        o.refuse_unused(
            context, "names offset compute", "is for an engine of yours", "Give its command with --exec, or two dumps."
        )
    if side is o.SideChoice.REF or given["command"] is not None:
        o.refuse_unused(context, "backend", "is for the engine that comes with parity")
    if pair is None and given["prompt"] is given["tokens"] is None:
        given_prompt(None, None, None)
    source = EXEC if given["command"] is not None else (side.value if side is not None else OURS)
    with waiting("comparing passes", output_format):
        result = check(ConsistencyRequest(Request(**given), source, chunk, pair))
    from reports import consistency as report

    raise typer.Exit(answer(result, report, output_format))
