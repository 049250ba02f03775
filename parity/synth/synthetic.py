"""A synthetic model in any of llama.cpp's types: by gguf-py where it can make them, else as llama.cpp's quantiser would.

Either way weights are stored as they are made, a few rows at a time, so that memory does not grow with the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.errors import InputError, ModelError
from checkpoints.gguf_file import contents
from checkpoints.whole_file import Replacement, is_special, unwritable
from engine.synth import Shape, synthesize
from engine.synth.data import Convert, Progress, TensorData, append
from engine.synth.dense import at_once, check_size, weights
from engine.synth.header import write_header
from engine.synth.recipe import Recipe, Value
from engine.synth.write import weights as weights_of
from engine.synth.write import write
from reference.jobs import FilePlan

if TYPE_CHECKING:
    from reference.client import Reference

_BY_GGUF = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def make(
    out: Path,
    shape: Shape,
    *,
    kind: str,
    seed: int = 0,
    tokenizer: Path | None = None,
    blocks: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a qwen2 or llama model to `out`; `blocks`: see `engine.synth.dense.weights`.

    Raises:
        InputError: an impossible shape or type, or an unwritable file.
    """
    tokens = shape.vocab if tokenizer is not None else 0
    with _replacement(out) as replacement:
        plain = replacement.temporary
        if kind.lower() in _BY_GGUF:
            synthesize(plain, shape, weight_type=kind, seed=seed, tokenizer=tokenizer, blocks=blocks, progress=progress)
            replacement.commit()
        else:
            from reference.client import Reference

            check_size(plain, 0, tokens)  # before the tokenizer is written, whose entries alone can fill the memory
            write_header(plain, shape, tokenizer)
            _make_hollow(plain)
            with Reference() as reference:
                planned = reference.quantised(plain, kind)
            room = (tokens, at_once(shape, blocks))
            _write(out, planned, partial(weights, shape, seed, blocks=blocks), room, progress)


def _make_hollow(path: Path) -> None:
    """Add the data section to a file with a table of contents of F32 tensors, as a hole that takes no room on the disk."""
    file = contents(path)
    with path.open("r+b") as opened:
        opened.truncate(file.data + sum(-(-4 * tensor.elements // file.alignment) * file.alignment for tensor in file.tensors))


def _write(
    out: Path,
    planned: FilePlan,
    tensors: Callable[[Mapping[str, int], Convert], Sequence[TensorData]],
    room: tuple[int, int],
    progress: Progress | None = None,
) -> None:
    """Write a file as it was planned, its weights quantised while they are made: the bytes of an F32 file that llama.cpp quantised.

    `room` is `check_size`'s: tokens of the vocabulary, and elements that are made at once.
    """
    from reference.from_float import FromFloat

    check_size(out, planned.size, *room)
    with Replacement(out) as replacement:
        replacement.temporary.write_bytes(planned.header)
        types = {tensor.name: tensor.type for tensor in planned.tensors}
        append(replacement.temporary, tensors(types, FromFloat()), progress)


@contextmanager
def _replacement(out: Path) -> Iterator[Replacement]:
    """A temporary file beside `out`, which replaces it on request and is removed otherwise; errors name `out`.

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
            tokens = shape.vocab if tokenizer is not None else 0
            check_size(plain, 0, tokens)  # as in `make`
            write(plain, recipe, shape, changes, tokenizer=tokenizer)
            tensors = recipe.tensors(reference.wanted_tensors(plain), tied=shape.tied)
            room = (tokens, max((prod(dims) for _, dims in tensors), default=0))
            check_size(plain, 0, *room)
            write(plain, recipe, shape, changes, tensors, tokenizer=tokenizer)
            _make_hollow(plain)
            try:
                reference.load(plain)
            except ModelError as error:
                raise ModelError(
                    error.message.replace(str(plain), f"this {recipe.name}"), "Change the shape or --set.", code="shape"
                ) from error
            kind = kind or recipe.kind
            planned = _as_it_is(plain) if kind.lower() == "f32" else reference.quantised(plain, kind)
            _write(out, planned, partial(weights_of, recipe, shape, tensors, seed), room)


def _as_it_is(path: Path) -> FilePlan:
    """A hollow file, to be rewritten with its weights."""
    file = contents(path)
    with path.open("rb") as opened:
        return FilePlan(opened.read(file.data), file.tensors, file.size)
