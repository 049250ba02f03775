"""`parity synth`: a model of any shape with seeded random weights."""

from math import inf
from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError


def synth(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The GGUF to write.")] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like", help="A shape of qwen2 or llama to start from: tiny, qwen2.5-0.5b, llama-3.2-1b, … Default: tiny."
        ),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option("--architecture", help="qwen3, gemma3, mixtral, deepseek2, mamba, …: `--architecture list` names all."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--type", help="Type of the matrices: f32, f16, bf16, q8_0, q4_k_m, … Default: f16.")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Number of layers.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="Embedding width.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", min=1, help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", min=1, help="Key/value heads.")] = None,
    head_size: Annotated[
        int | None, typer.Option("--head-size", min=2, help="Size of one head, if it is not width / heads.")
    ] = None,
    ff: Annotated[int | None, typer.Option("--ff", min=1, help="Feed-forward width.")] = None,
    vocab: Annotated[int | None, typer.Option("--vocab", min=1, help="Vocabulary size.")] = None,
    tied: Annotated[
        bool | None, typer.Option("--tied/--untied", help="Whether the output matrix is the embedding matrix.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Context length that the model claims to be trained for.")
    ] = None,
    rope_base: Annotated[float | None, typer.Option("--rope-base", help="Base of the rotary frequencies.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A metadata value, with --architecture only: --set attention.sliding_window=16; can be repeated."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the weights.")] = 0,
    blocks: Annotated[
        int | None,
        typer.Option(
            "--blocks",
            min=1,
            max=1 << 20,
            help="Draw the matrices from this many blocks of 256 random weights: 8 B parameters as Q4_K_M in half a minute instead of "
            "a quarter of an hour. 65536 is a good number. For qwen2 and llama.",
        ),
    ] = None,
    stub_vocabulary: Annotated[
        bool, typer.Option("--stub-vocabulary", help="Leave the tokenizer out; prompts then need --tokens.")
    ] = False,
) -> None:
    """Write a GGUF with seeded random weights: qwen2 and llama of any shape, over a hundred other architectures in small sizes."""
    if rope_base is not None and not 0 < rope_base < inf:
        raise InputError(
            f"--rope-base must be a finite number above 0, not {rope_base}.", "Write e.g. --rope-base 10000.", code="shape"
        )
    if architecture == "list":
        from engine.synth.recipes import names

        print("\n".join(names()))
        return
    if out is None:
        raise InputError("no output file was given.", "Write -o FILE.", code="output")
    from ..models.embedded import path as default_model
    from ..synth.synthetic import make, make_by_recipe
    from .options import Format
    from .output import progress_bar, written

    changes = {
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "ff": ff,
        "vocab": vocab,
        "tied": tied,
        "context": context,
        "rope_base": rope_base,
    }
    tokenizer = None if stub_vocabulary else default_model()
    if architecture in (None, "qwen2", "llama"):
        from engine.synth import shape_like

        if settings:
            raise InputError(
                "--set works with --architecture only.", "`--architecture list` names the architectures.", code="set"
            )
        shape = shape_like(like or "tiny", architecture=architecture, **changes)
        with progress_bar(Format.TEXT) as progress:
            make(out, shape, kind=kind or "f16", seed=seed, tokenizer=tokenizer, blocks=blocks, progress=progress)
    else:
        from engine.synth.recipe import parse_settings, shape_of
        from engine.synth.recipes import recipe

        chosen = recipe(architecture)
        if blocks is not None:
            raise InputError("--blocks is for qwen2 and llama only.", "Leave it out.", code="shape")
        if like is not None:
            raise InputError(
                "--like is for shapes of qwen2 and llama only.", f"Give --layers, --width, … for {architecture}.", code="shape"
            )
        own = shape_of(chosen, **changes)
        make_by_recipe(out, chosen, own, parse_settings(settings or ()), kind=kind, seed=seed, tokenizer=tokenizer)
    written(out)
