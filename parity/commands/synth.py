"""`parity synth`: a model of any shape with seeded random weights."""

from math import inf
from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError


def synth(
    out: Annotated[Path, typer.Option("--out", "-o", help="The GGUF to write.")],
    like: Annotated[str, typer.Option("--like", help="A shape to start from: tiny, qwen2.5-0.5b, llama-3.2-1b, …")] = "tiny",
    architecture: Annotated[
        str | None, typer.Option("--architecture", help="qwen2 or llama; default: the shape's own.")
    ] = None,
    kind: Annotated[str, typer.Option("--type", help="Type of the matrices: f32, f16, bf16, q8_0, q4_0, …")] = "f16",
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Number of layers.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="Embedding width.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", min=1, help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", min=1, help="Key/value heads.")] = None,
    head_size: Annotated[
        int | None, typer.Option("--head-size", min=2, help="Size of one head, where it is not width / heads.")
    ] = None,
    ff: Annotated[int | None, typer.Option("--ff", min=1, help="Feed-forward width.")] = None,
    vocab: Annotated[int | None, typer.Option("--vocab", min=1, help="Vocabulary size.")] = None,
    tied: Annotated[bool | None, typer.Option("--tied/--untied", help="Whether the output matrix is the embedding's.")] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Positions the model was trained for.")] = None,
    rope_base: Annotated[float | None, typer.Option("--rope-base", help="Base of the rotary frequencies.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the weights.")] = 0,
    stub_vocabulary: Annotated[bool, typer.Option("--stub-vocabulary", help="No tokenizer: prompts by --tokens only.")] = False,
) -> None:
    """Write a GGUF of a supported architecture and any shape with seeded random weights: for tests, benchmarks, bug reports."""
    from engine.synth import shape_like

    from ..models.embedded import path as default_model
    from .output import written

    if rope_base is not None and not 0 < rope_base < inf:
        raise InputError(f"a RoPE base of {rope_base} gives no frequencies.", "Write e.g. --rope-base 10000.", code="shape")
    from ..synth.synthetic import make

    shape = shape_like(
        like,
        architecture=architecture,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ff=ff,
        vocab=vocab,
        tied=tied,
        context=context,
        rope_base=rope_base,
    )
    make(out, shape, kind=kind, seed=seed, tokenizer=None if stub_vocabulary else default_model())
    written(out)
