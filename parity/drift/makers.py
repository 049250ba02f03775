"""Whoever writes the dumps of a golden prompt: our engine, llama.cpp, or a foreign engine's command."""

import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.errors import InputError
from checkpoints.formats import load
from checkpoints.jsonl import write
from checkpoints.record import Header
from reference.client import Reference
from reference.jobs import DumpJob

from ..run.foreign import run_command
from .golden import Golden, GoldenPrompt

if TYPE_CHECKING:
    from engine.transformer import Transformer

Make = Callable[[GoldenPrompt, Path], None]  # writes the dump of a prompt


@contextmanager
def maker(
    golden: Golden, source: str, model: Path, reference: Reference, command: str | None, threads: int | None, backend: str
) -> Iterator[Make]:
    """Writes dumps of one side, prompt after prompt; the model is opened once."""
    if source == "exec":
        if command is None:
            raise InputError("these golden dumps are a foreign engine's.", "Give its command with --exec.", code="exec")
        runs = reference.twin(model) if golden.mode == "exact" else model
        line = command
        yield lambda prompt, out: _foreign_dump(line, runs, prompt, out)
    elif source == "ref":
        yield lambda prompt, out: _reference_dump(reference, golden, model, prompt, out, threads)
    else:
        from engine.backend import choose
        from engine.transformer import Transformer
        from engine.weights.gguf_model import GgufModel

        transformer = Transformer(GgufModel(model), choose(backend))
        yield lambda prompt, out: _our_dump(transformer, golden, prompt, out)


def _foreign_dump(command: str, model: Path, prompt: GoldenPrompt, out: Path) -> None:
    """What a foreign engine printed, in whatever format, becomes format 1: golden lines are found and rewritten by their keys."""
    with tempfile.TemporaryDirectory(prefix="parity-drift-") as scratch:
        printed = Path(scratch) / "printed.jsonl"
        run_command(command, model=model, tokens=(*prompt.tokens, *prompt.generated), out=printed)
        write(load(printed), out, Header(source=f"printed by {shlex.split(command)[0]}"))


def _our_dump(transformer: "Transformer", golden: Golden, prompt: GoldenPrompt, out: Path) -> None:
    from ..run.ours import OursJob, dump

    job = OursJob(
        out,
        prompt.tokens,
        pieces=prompt.pieces,
        prompt=prompt.text,
        mode=golden.mode,
        points=golden.points,
        slice_size=golden.slice_size,
        generated=prompt.generated,
        generated_pieces=prompt.generated_pieces,
    )
    dump(transformer, job)


def _reference_dump(
    reference: Reference, golden: Golden, model: Path, prompt: GoldenPrompt, out: Path, threads: int | None
) -> None:
    job = DumpJob(
        model,
        out,
        prompt.tokens,
        prompt=prompt.text,
        pieces=prompt.pieces,
        mode=golden.mode,
        points=golden.points,
        slice=golden.slice_size,
        lead=prompt.generated or None,
        threads=threads,
    )
    reference.dump(job)


def led(
    prompt: GoldenPrompt, golden: Golden, reference: Reference, model: Path, generate: int, threads: int | None
) -> GoldenPrompt:
    """The prompt with the tokens that llama.cpp chooses after it: every later run is led along them."""
    with tempfile.TemporaryDirectory(prefix="parity-drift-") as scratch:
        job = DumpJob(
            model,
            Path(scratch) / "chosen.jsonl",
            prompt.tokens,
            mode=golden.mode,
            points="logits",
            generate=generate,
            threads=threads,
        )
        chosen = reference.dump(job).generated
    return replace(prompt, generated=chosen, generated_pieces=tuple(reference.pieces(model, chosen)))
