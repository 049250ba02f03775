"""The ways in which our engine computes a prompt: in one pass or in portions, among other sequences, from a saved state."""

from collections import deque
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import InputError
from checkpoints.recording import passes
from engine import saved_state
from engine.capture.tap import Capture
from engine.engine import Engine, Progress
from engine.graph import in_one_pass
from engine.transformer import Transformer

from .request import Prompt

Logits = NDArray[np.float32]  # [V], of the last position of a pass
_TURN = 4  # tokens that a sequence of a batch computes before the others have theirs


def computed(engine: Engine, prompt: Prompt, first_position: int, capture: Capture) -> tuple[Progress, Logits]:
    """Compute a prompt as it asks to be: its sequence, to be continued, and the logits of its last position.

    Raises:
        InputError: tokens that the model does not take, portions of an encoder's input, or a state that cannot be saved.
    """
    sequence = engine.start(first_position)
    if prompt.companions:
        return sequence, _in_turns(engine, prompt, sequence, capture)
    if prompt.saved:
        return _resumed(engine, prompt, sequence, capture)
    return sequence, deque(_passes(engine, prompt, sequence, capture), maxlen=1).pop()


def _passes(engine: Engine, prompt: Prompt, sequence: Progress, capture: Capture | None) -> Iterator[Logits]:
    """Its passes, one by one. An encoder–decoder's first one is the encoder's too; the portions are of the decoder's tokens."""
    if engine.encoder is None:
        for part in passes(len(prompt.ids), prompt.portions):
            yield engine.forward(prompt.ids[part], sequence, capture)
        return
    if prompt.portions and not prompt.decoded:
        raise InputError(
            "the encoder computes the whole prompt in one pass, and the decoder was given no tokens to compute in portions.",
            "Give all tokens at once.",
            code="encoder",
        )
    first, *others = passes(1 + len(prompt.decoded), prompt.portions)
    sequence.leading = prompt.decoded[: first.stop - 1]
    yield engine.forward(prompt.ids, sequence, capture)
    for part in others:
        yield engine.forward(prompt.decoded[part.start - 1 : part.stop - 1], sequence, capture)


def _in_turns(engine: Engine, prompt: Prompt, sequence: Progress, capture: Capture) -> Logits:
    """The prompt as the last of several sequences, none finished before the next begins: a pass of this engine is of one sequence."""
    others = [Prompt(None, ids, (), decoded=ids[:-1] if prompt.decoded else ()) for ids in prompt.companions]
    running = [_passes(engine, _cut(engine, other), engine.start(sequence.first), None) for other in others]
    running.append(_passes(engine, _cut(engine, prompt), sequence, capture))
    return next(logits for *_, logits in reversed(list(zip_longest(*running))) if logits is not None)


def _cut(engine: Engine, prompt: Prompt) -> Prompt:
    """The prompt in turns; whole where it must be."""
    count = len(prompt.ids) if engine.encoder is None else 1 + len(prompt.decoded)
    size = count if in_one_pass(engine.steps) else _TURN
    turns = tuple(min(size, count - start) for start in range(0, count, size))
    return Prompt(prompt.text, prompt.ids, prompt.pieces, portions=turns if len(turns) > 1 else (), decoded=prompt.decoded)


def _resumed(engine: Engine, prompt: Prompt, sequence: Progress, capture: Capture) -> tuple[Progress, Logits]:
    """The first tokens, into a state on disk; a new sequence is read from it and takes the others."""
    if not isinstance(engine, Transformer):
        raise InputError("the fast engine keeps its sequences on the device and saves none.", "Use --mode exact.", code="state")
    if engine.encoder is None:
        begin, rest = prompt.ids[: prompt.saved], prompt.ids[prompt.saved :]
    else:
        begin, rest = prompt.ids, prompt.decoded[prompt.saved - 1 :]
        sequence.leading = prompt.decoded[: prompt.saved - 1]
    if not rest:
        raise InputError(f"a state cannot be saved after {prompt.saved} tokens: none follow.", "Save it earlier.", code="state")
    engine.forward(begin, sequence, capture)
    resumed = engine.start(sequence.first)
    with TemporaryDirectory(prefix="parity-state-") as folder:
        state = Path(folder) / "state.safetensors"
        saved_state.save(sequence, engine.cache_backends, state)
        saved_state.restore(state, resumed, engine.cache_backends)
    return resumed, engine.forward(rest, resumed, capture)
