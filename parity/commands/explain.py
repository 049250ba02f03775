"""`parity explain`: which known fault reproduces these numbers?"""

from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError

from . import options as o


@o.fills("model", "optional_prompt", "mapping", "compute", "arbiter", "backend")
def explain(
    given: o.Given,
    context: typer.Context,
    ours: Annotated[Path | None, typer.Argument(help="Your engine's dump.", show_default=False)] = None,
    ref: Annotated[
        Path | None, typer.Option("--ref", help="llama.cpp's dump of the same prompt: checks our engine against it first.")
    ] = None,
    max_faults: Annotated[int, typer.Option("--max-faults", min=1, max=8, help="Largest number of faults to combine.")] = 4,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            min=0.1,
            help="Seconds that pass until the search stops and reports what it has found. Default: 60 s of its own processor time, and "
            "at most 5 minutes where other work shares the machine.",
            show_default=False,
        ),
    ] = None,
    catalogue: Annotated[bool, typer.Option("--list", help="Print the catalogue of known faults.")] = False,
    output_format: o.FormatOption = o.Format.TEXT,
) -> None:
    """Find the known fault (wrong RoPE pairs, a missing bias, …) that reproduces the numbers of your engine.

    Replays each fault of the catalogue in our engine until one gives the numbers of your dump. The prompt is the dump's
    own, unless you give another. Exits 0 if there is no fault, 1 if there is one, whether its cause is found or not, or if that stays
    undecided.
    """
    from reports import explanation

    from .output import answer, catalogue_as, waiting

    if catalogue:
        if ours is not None:
            raise InputError("--list takes no dump.", "Leave one of them out.", code="usage")
        names = "model prompt prompt_file tokens names offset compute arbiter backend ref max_faults budget"
        o.refuse_unused(context, names, "has no effect with --list, which prints the whole catalogue")
        catalogue_as(output_format)
        return
    if ours is None:
        raise InputError(
            "no dump was given.", "Write: parity explain OURS.jsonl --model M.gguf, or parity explain --list.", code="usage"
        )
    from checkpoints.formats import load

    from ..diff.measured.tokens import same_experiment
    from ..explain.explain import ExplainOptions
    from ..explain.input import check_reference, explain_dump, prompt_ids

    if budget is not None and not isfinite(budget):
        raise InputError(f"--budget must be a finite number of seconds, not {budget}.", "Write e.g. --budget 60.", code="usage")

    model, mapping = given.pop("model"), given.pop("mapping")
    tokens = prompt_ids(model, given.pop("prompt"), given.pop("tokens"))
    options = ExplainOptions(**given, tokens=tokens, max_faults=max_faults, budget=budget)
    with waiting("looking for the cause", output_format):
        dump = load(ours, mapping)
        if ref is not None:
            reference = load(ref)
            same_experiment(dump, reference)
            check_reference(reference, model, options)
        explained = explain_dump(dump, model, options)
    raise typer.Exit(answer(explained, explanation, output_format))
