"""`parity explain`: which known fault reproduces these numbers?"""

from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError

from . import options as o


def explain(
    ours: Annotated[Path | None, typer.Argument(help="Your engine's dump.", show_default=False)] = None,
    model: o.ModelOption = None,
    ref: Annotated[
        Path | None, typer.Option("--ref", help="llama.cpp's dump of the same prompt: checks our engine against it first.")
    ] = None,
    prompt: o.PromptOption = None,
    prompt_file: o.PromptFileOption = None,
    tokens: o.TokensOption = None,
    names: o.MapOption = None,
    offset: o.OffsetOption = None,
    max_faults: Annotated[int, typer.Option("--max-faults", min=1, max=8, help="Largest number of faults to combine.")] = 4,
    budget: Annotated[
        float,
        typer.Option("--budget", min=0.1, help="Seconds after which the search stops and answers with what it has found."),
    ] = 60.0,
    compute: Annotated[
        o.Compute | None,
        typer.Option("--compute", help="The arithmetic of your engine, if it is not f32; its rounding noise is measured."),
    ] = None,
    arbiter: o.ArbiterOption = o.Arbiter.AUTO,
    backend: o.BackendOption = o.BackendName.AUTO,
    catalogue: Annotated[bool, typer.Option("--list", help="Print the catalogue of known faults.")] = False,
    form: o.FormatOption = o.Format.TEXT,
) -> None:
    """Your engine writes garbage: find the known fault (wrong RoPE pairs, a missing bias, …) that reproduces its numbers.

    Replays each fault of the catalogue in our engine until one gives the numbers of your dump. The prompt is the dump's
    own, unless you give it. Exits 0 if there is no fault, 1 if there is one, known or not.
    """
    from reports import explanation

    from ..explain.explain import ExplainOptions
    from .output import answer, catalogue_as

    if catalogue:
        catalogue_as(form)
        return
    if ours is None:
        raise InputError(
            "no dump was given.", "Write: parity explain OURS.jsonl --model M.gguf, or parity explain --list.", code="usage"
        )
    from ..diff.tokens import same_experiment
    from ..explain.input import check_reference, explain_dump, prompt_tokens
    from ..models.embedded import path as default_model

    if not isfinite(budget):
        raise InputError(f"--budget must be a finite number of seconds, not {budget}.", "Write e.g. --budget 60.", code="usage")

    chosen = model or default_model()
    ids = prompt_tokens(chosen, prompt, prompt_file, tokens)
    options = ExplainOptions(ids, max_faults, budget, backend.value, compute.value if compute else None, arbiter.value)
    dump = o.dump(ours, names, offset)
    if ref is not None:
        reference = o.dump(ref)
        same_experiment(dump, reference)
        check_reference(reference, chosen, options)
    raise typer.Exit(answer(explain_dump(dump, chosen, options), explanation, form))
