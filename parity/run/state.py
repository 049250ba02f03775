"""A foreign engine that saves its state and continues from it in a new process; and its records of one prompt of a batch."""

import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from checkpoints.formats import load
from checkpoints.mapping import Mapping
from checkpoints.record import Dump

from .command import STATE, Command, EngineError
from .request import Prompt


def resumed(command: Command, model: Path, prompt: Prompt, out: Path, points: str) -> None:
    """Run the engine over the first `prompt.saved` tokens, then again over all, from the state that it left; `out` is the second's.

    Raises:
        EngineError: the engine fails, or leaves no state.
    """
    state = out.with_name(f"{out.name}.state")
    _removed(state)
    try:
        command.run(model=model, tokens=prompt.ids[: prompt.saved], out=out, points=points, state=state)
        if not state.exists():
            raise EngineError(f"{command.name} left no state in {STATE}.", "It must save its state there when it ends.")
        rest = len(prompt.ids) - prompt.saved
        command.run(model=model, tokens=prompt.ids, out=out, points=points, state=state, portions=(rest,))
    finally:
        _removed(state)


def _removed(state: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(state) if state.is_dir() else state.unlink(missing_ok=True)


def loaded(out: Path, prompt: Prompt, mapping: Mapping) -> Dump:
    """Read the dump of a prompt: from a batch only the records of this prompt, as its only sequence.

    Raises:
        DumpError: it cannot be read; EngineError: it has no records of this sequence, or shows that no state was restored.
    """
    dump = load(out, mapping)
    if prompt.companions:
        dump = _sequence(dump, len(prompt.companions), prompt.ids)
    if prompt.saved and any((rows.token_idx < prompt.saved).any() for rows in dump.points.values()):
        raise EngineError(
            f"the run after the state was restored computed positions below {prompt.saved} again.",
            f"If the file of {STATE} exists, continue from it without computing its tokens again.",
        )
    return dump


def _sequence(dump: Dump, number: int, ids: tuple[int, ...]) -> Dump:
    points = {}
    for name, rows in dump.points.items():
        own = rows.take(rows.seq == number)
        if len(own):
            points[name] = replace(own, seq=np.zeros_like(own.seq))
    if not points:
        raise EngineError(
            f"the dump of the batch has no records of sequence {number}.",
            'The prompts of a batch are numbered from 0: {"seq": 1, …} in each line.',
        )
    header = None if dump.header is None else replace(dump.header, tokens=ids, pieces=())
    tokens = tuple(replace(token, seq=0) for token in dump.tokens if token.seq == number)
    return replace(dump, header=header, points=points, tokens=tokens)
