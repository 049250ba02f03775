"""A synthetic model in any of llama.cpp's types: made by gguf-py where it can, quantised by llama.cpp where it can't."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.errors import ModelError
from engine.synth import Shape, synthesize
from engine.synth.recipe import Recipe, Value
from engine.synth.write import write

if TYPE_CHECKING:
    from reference.client import Reference

_BY_GGUF = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def make(out: Path, shape: Shape, *, kind: str, seed: int = 0, tokenizer: Path | None = None) -> None:
    """Write a qwen2 or llama model to `out`.

    Raises:
        InputError: an impossible shape or type, or an unwritable file.
    """
    if kind.lower() in _BY_GGUF:
        synthesize(out, shape, weight_type=kind, seed=seed, tokenizer=tokenizer)
        return
    from reference.client import Reference

    plain = out.with_name(out.name + ".f32.part")
    try:
        synthesize(plain, shape, weight_type="f32", seed=seed, tokenizer=tokenizer)
        with Reference() as reference:
            reference.quantize(plain, kind, out)
    finally:
        plain.unlink(missing_ok=True)


def make_by_recipe(
    out: Path,
    recipe: Recipe,
    shape: Shape,
    changes: Mapping[str, Value],
    *,
    kind: str | None = None,
    seed: int = 0,
    tokenizer: Path | None = None,
    running: "Reference | None" = None,
) -> None:
    """Write a model of any architecture to `out`: llama.cpp names the tensors, and has loaded the file before it is there.

    Args:
        changes: metadata that replace the recipe's or come on top.
        kind: a file type of llama.cpp's ("q4_k_m"), which chooses each tensor's type; None for the recipe's own.
        running: a reference that was started already and goes on afterwards.

    Raises:
        InputError: no such type, or an unwritable file; ModelError: llama.cpp makes no model of this shape.
    """
    from reference.client import Reference

    plain = out.with_name(out.name + ".f32.part")
    try:
        with nullcontext(running) if running is not None else Reference() as reference:
            write(plain, recipe, shape, changes, tokenizer=tokenizer)
            tensors = recipe.tensors(reference.wanted_tensors(plain), tied=shape.tied)
            write(plain, recipe, shape, changes, tensors, seed=seed, tokenizer=tokenizer)
            try:
                reference.load(plain)
            except ModelError as error:
                raise ModelError(
                    error.message.replace(str(plain), f"this {recipe.name}"), "Change the shape or --set.", code="shape"
                ) from error
            kind = kind or recipe.kind
            if kind.lower() == "f32":
                plain.replace(out)
            else:
                reference.quantize(plain, kind, out)
    finally:
        plain.unlink(missing_ok=True)
