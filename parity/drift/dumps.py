"""The dumps of golden prompts, written by any side, which opens the model once."""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path

from msgspec.structs import replace

from checkpoints.answers.diff import Uncompared
from checkpoints.errors import InputError
from checkpoints.formats import load
from checkpoints.jsonl import write
from checkpoints.reading.reader import read
from checkpoints.record import Header
from reference.client import Reference

from ..diff.measured.uncompared import uncompared
from ..run.request import Prompt, Request
from ..run.sides import EXEC, REF, ExternalEngine, LlamaCpp, Side, side_of
from ..run.workers import workers_of
from .golden import GoldenPrompt

_ATTEMPTS = 3  # times that a lost worker's prompts are tried


class GoldenDumps:
    """Writes the dumps of one side, prompt after prompt."""

    def __init__(self, source: str, request: Request, reference: Reference) -> None:
        self._source = source
        self._request = request
        self._reference = reference
        self._side: Side = side_of(source, request, reference, resident=True)

    def write(self, prompt: Prompt, out: Path) -> None:
        """Write one prompt's dump, in format 1 for every side, since golden lines are looked up and rewritten by their keys."""
        if self._source != EXEC or self._request.command is None:
            self._side.dump(prompt, out)
            return
        with tempfile.TemporaryDirectory(prefix="parity-drift-") as scratch:
            printed = Path(scratch) / "printed.jsonl"
            self._side.dump(prompt, printed)
            write(load(printed), out, Header(source=f"printed by {self._request.command.name}"))

    def lacking(self, prompt: Prompt, out: Path) -> Uncompared:
        """What a foreign engine was asked for and did not print into `out`; false of parity's own sides, which print all of it."""
        if not isinstance(self._side, ExternalEngine):
            return Uncompared()
        points = read(out).points
        positions = {position for rows in points.values() for position in rows.token_idx.tolist()}
        return uncompared(self._side.requested, points.keys(), range(len(prompt.ids)), positions)

    def write_again(self, kept: GoldenPrompt, out: Path) -> None:
        """Write the dump of a recorded prompt; llama.cpp tokenizes it again, since its tokenizer is checked, too."""
        prompt = kept.prompt
        if self._source == REF:
            ids = self._reference.tokenize(self._request.model, kept.text)
            if ids.ids != kept.tokens:
                prompt = replace(prompt, ids=ids.ids, pieces=ids.pieces)
        self.write(prompt, out)


def dumped_by_workers(
    source: str, run: Request, prompts: Sequence[GoldenPrompt], workers: int, cluster: str
) -> Iterator[tuple[GoldenPrompt, bytes]]:
    """Each prompt with its dump's lines, as workers finish them; a killed worker's prompts run again.

    Raises:
        ParityError: as in `GoldenDumps.write`; InputError: there is no such cluster, its connection is lost, or workers keep dying.
    """
    rest = list(prompts)
    for _ in range(_ATTEMPTS):
        try:
            with workers_of(min(workers, len(rest)), cluster) as pool:
                pending = {pool.submit(_dump_of, source, run, kept): kept for kept in rest}
                for finished in as_completed(pending):
                    dump = finished.result()
                    rest.remove(pending[finished])
                    yield pending[finished], dump
        except BrokenProcessPool:
            continue
        else:
            return
    raise InputError(f"worker processes died {_ATTEMPTS} times.", "Run with --workers 1 to see why.", code="workers")


def _dump_of(source: str, run: Request, kept: GoldenPrompt) -> bytes:
    """One prompt's dump, small enough to be sent, by the side that this process has opened."""
    with tempfile.TemporaryDirectory(prefix="parity-drift-") as scratch:
        out = Path(scratch) / "dump.jsonl"
        _opened(source, run).write_again(kept, out)
        return out.read_bytes()


@cache
def _opened(source: str, run: Request) -> GoldenDumps:
    return GoldenDumps(source, run, Reference(threads=run.threads))


def chosen_by_llama_cpp(prompt: Prompt, request: Request, reference: Reference) -> Prompt:
    """The prompt with the tokens that llama.cpp chooses after it: every later run is led along them."""
    with tempfile.TemporaryDirectory(prefix="parity-drift-") as scratch:
        chooser = LlamaCpp(replace(request, points="logits"), reference)
        chosen = chooser.dump(prompt, Path(scratch) / "chosen.jsonl").generated
    return prompt.followed_by(chosen, tuple(reference.pieces(request.model, chosen)))
