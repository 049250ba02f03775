"""A synthetic model in any of llama.cpp's types: made by gguf-py where it can, quantised by llama.cpp where it can't."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.errors import InputError, ModelError
from checkpoints.whole_file import Replacement, is_special, unwritable
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
    by_gguf = kind.lower() in _BY_GGUF
    with _replacement(out) as replacement:
        plain = replacement.temporary
        synthesize(plain, shape, weight_type=kind if by_gguf else "f32", seed=seed, tokenizer=tokenizer)
        if by_gguf:
            replacement.commit()
        else:
            from reference.client import Reference

            with Reference() as reference:
                reference.quantize(plain, kind, out)


@contextmanager
def _replacement(out: Path) -> Iterator[Replacement]:
    """A file beside `out`, which takes its place where that is asked for, and is gone afterwards; errors name `out`.

    Raises:
        InputError: it cannot be written.
    """
    if is_special(out):
        raise InputError(f"cannot write a model to {out}: it is a pipe or a device.", "Name a file.", code="output")
    try:
        replacement = Replacement(out)
    except OSError as error:
        raise unwritable(out, error, "Choose another -o.") from error
    try:
        yield replacement
    except OSError as error:
        raise unwritable(out, error, "Choose another -o.") from error
    except InputError as error:
        message = error.message.replace(str(replacement.temporary), str(out))
        raise type(error)(message, error.advice, code=error.code) from error
    finally:
        replacement.discard()


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

    with _replacement(out) as replacement:
        plain = replacement.temporary
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
                replacement.commit()
            else:
                reference.quantize(plain, kind, out)
