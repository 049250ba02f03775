"""`parity consistency`: an engine against itself."""

from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError

from ..run.prompt import given_prompt
from . import options as o


def consistency(
    dumps: Annotated[
        list[Path] | None,
        typer.Argument(help="Two dumps of your engine over the same tokens, computed in different portions."),
    ] = None,
    model: o.ModelOption = None,
    prompt: o.PromptOption = None,
    prompt_file: o.PromptFileOption = None,
    tokens: o.TokensOption = None,
    points: o.PointsOption = "all",
    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Tokens a chunk in the check of a prefill in chunks.")] = 4,
    backend: o.BackendOption = o.BackendName.AUTO,
    names: o.MapOption = None,
    offset: o.OffsetOption = None,
    compute: o.ComputeOption = None,
    tolerance: o.ToleranceOption = None,
    form: o.FormatOption = o.Format.TEXT,
    verbose: o.VerboseOption = False,
) -> None:
    """Does an engine agree with itself? The prompt at once, token by token, in chunks: no reference is needed.

    Your first token is right and the text falls apart later? Then prefill and decode disagree: dump the same tokens twice, once
    as one prompt and once token by token, and give both dumps. What fails says whether cache, positions or mask are to blame.

      parity consistency whole.jsonl steps.jsonl         two dumps of your engine

      parity consistency --model M.gguf --prompt "Hi"    our engine

    Exits 0 if all agree, 1 if something differs.
    """
    from ..consistency.consistency import ConsistencyRequest
    from ..consistency.consistency import consistency as check
    from ..models.embedded import path as default_model
    from .output import answer

    if dumps is not None and len(dumps) not in (0, 2):
        raise InputError(f"{len(dumps)} dumps were given.", "Take two, or none and --prompt.", code="dumps")
    pair = (dumps[0], dumps[1]) if dumps else None
    text, ids = (None, None) if pair else given_prompt(prompt, prompt_file, tokens)
    found = check(
        ConsistencyRequest(
            model=model or default_model(),
            prompt=text,
            tokens=ids,
            points=points,
            chunk=chunk,
            backend=backend.value,
            dumps=pair,
            mapping=o.mapping(names, offset),
            compute=compute.value if compute else None,
            tolerance=tolerance,
            verbose=verbose,
        )
    )
    from reports import consistency as report

    raise typer.Exit(answer(found, report, form))
