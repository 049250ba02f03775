"""The dumps of golden prompts: written by any side, the model opened once."""

import shlex
import tempfile
from dataclasses import replace
from pathlib import Path

from checkpoints.formats import load
from checkpoints.jsonl import write
from checkpoints.record import Header
from reference.client import Reference

from ..run.request import Prompt, Request
from ..run.sides import EXEC, LlamaCpp, Side, side_of


class GoldenDumps:
    """Writes the dumps of one side, prompt after prompt."""

    def __init__(self, source: str, request: Request, reference: Reference) -> None:
        self._source = source
        self._request = request
        self._side: Side = side_of(source, request, reference, resident=True)

    def write(self, prompt: Prompt, out: Path) -> None:
        """Write one prompt's dump, in format 1 whoever computes it: golden lines are looked up and rewritten by their keys."""
        if self._source != EXEC or self._request.command is None:
            self._side.dump(prompt, out)
            return
        with tempfile.TemporaryDirectory(prefix="parity-drift-") as scratch:
            printed = Path(scratch) / "printed.jsonl"
            self._side.dump(prompt, printed)
            write(load(printed), out, Header(source=f"printed by {shlex.split(self._request.command.line)[0]}"))


def chosen_by_llama_cpp(prompt: Prompt, request: Request, reference: Reference) -> Prompt:
    """The prompt with the tokens that llama.cpp chooses after it: every later run is led along them."""
    with tempfile.TemporaryDirectory(prefix="parity-drift-") as scratch:
        chooser = LlamaCpp(replace(request, points="logits"), reference)
        chosen = chooser.dump(prompt, Path(scratch) / "chosen.jsonl").generated
    return prompt.followed_by(chosen, tuple(reference.pieces(request.model, chosen)))
