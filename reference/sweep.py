"""A dump window by window: all forward passes through the first window, then all through the next.

Each window has a KV cache of its own, so decode steps are exact too. Each token that is not known beforehand takes another
sweep, which is correct but slow; the whole model is the better way wherever it fits.
"""

import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints import points
from checkpoints.columns import open_dump
from checkpoints.errors import InputError
from checkpoints.gguf_file import Contents
from checkpoints.tensors import beside

from . import dump, twin, twin_cache
from .after_quantising import is_f32
from .callback import Deliver
from .dataflow import dataflow
from .emitter import EmittedPass, Emitter, steps_of
from .jobs import EXACT, DumpJob, DumpResult
from .library import Library
from .model import Model
from .naming import Planned
from .refusals import check, generates
from .rows import survey
from .session import Session
from .windows import Window, layer_bytes, open_window, vocabulary_of

if TYPE_CHECKING:
    from .window_proof import Proof

_SHARE = 2  # a whole model may take half of the free memory
_WINDOW_SHARE = 4  # a window a quarter, since its file, its F32 copy and its page cache add up


def window_size(library: Library, contents: Contents, job: DumpJob, free: int) -> int | None:
    """How many layers a window has, None for the whole model at once.

    Raises:
        InputError: a window was asked for that is not possible.
    """
    exact = job.mode == EXACT
    if job.window == "off" or job.portions:  # a window computes the prompt in one pass
        return None
    if isinstance(job.window, int):
        if job.window < 1:
            raise InputError(f"a window of {job.window} layers is empty.", "Use 1 or more.", code="window")
        return job.window if job.window < contents.layers else None
    if job.window != "auto":
        raise InputError(f"--window {job.window!r} is not valid.", "Use auto, off, or a number of layers.", code="window")
    if not exact:
        return None
    need = twin.twin_bytes(contents)
    folder = twin_cache.workspace()
    if need * _SHARE < free:
        fits = need * _SHARE < shutil.disk_usage(folder).free
        if fits or is_f32(contents) or twin_cache.has_twin(contents):
            return None
    layer_size, rest = layer_bytes(library, contents, exact=exact)
    return min(max(1, (free // _WINDOW_SHARE - rest) // max(layer_size, 1)), contents.layers - 1) or None


def _no_room(contents: Contents, refusal: InputError) -> InputError:
    """The error for who did not ask for windows: they were taken because the whole model has no room."""
    size = twin.twin_bytes(contents) / 1e9
    return InputError(
        f"there is no room for an F32 copy of {contents.path.name} ({size:.2g} GB) in the memory or in the cache "
        f"{twin_cache.workspace()}, and {refusal.message}",
        "Free some, or set PARITY_CACHE to another disk; --mode native needs no copy.",
        code="room",
    )


class _Sweep(Struct, frozen=True):
    """What stays the same in every sweep over the model."""

    library: Library
    contents: Contents
    job: DumpJob
    spans: Sequence[tuple[int, int]]
    proof: "Proof"

    @property
    def n_vocab(self) -> int:
        return next(tensor.ne[1] for tensor in self.contents.tensors if tensor.name == "token_embd.weight")

    def _known(self, session: Session, inputs: Any, first: int) -> list[Planned]:
        return list(survey(session, inputs, offset=first).known)

    def run(self, steps: Sequence[EmittedPass], names: set[str], emitter: Emitter | None) -> list[NDArray[np.float32]]:
        """Compute all steps and return the logits of the last position of each."""
        hidden: list[NDArray[np.float32]] = []
        logits: list[NDArray[np.float32]] = []
        ids = tuple(token for step in steps for token in step.tokens)
        for first, stop in self.spans:
            window = Window(first, stop, ids if first == 0 else None, self.proof.untied)
            with open_window(
                self.library, self.contents, window, exact=self.job.mode == EXACT, threads=self.job.threads
            ) as model:
                if first == 0:
                    inputs: list[Any] = [_local(step.tokens, ids, self.n_vocab) for step in steps]
                else:
                    inputs = list(hidden)
                hidden, logits = self._through(model, window, steps, inputs, names, emitter)
        return logits

    def _through(
        self,
        model: Model,
        window: Window,
        steps: Sequence[EmittedPass],
        inputs: Sequence[Any],
        names: set[str],
        emitter: Emitter | None,
    ) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
        outputs: list[NDArray[np.float32]] = []
        logits: list[NDArray[np.float32]] = []
        n_ctx = sum(len(step.tokens) for step in steps)
        output = points.in_layer(window.stop - 1, "l_out")
        last = window.stop == self.contents.layers
        kv_type, threads = self.job.kv_type, self.job.threads
        with Session(model, n_ctx=n_ctx, n_batch=len(steps[0].tokens), kv_type=kv_type, threads=threads) as session:
            known = self._own(self._known(session, inputs[0], window.first), window)
            wanted = [item for item in known if item.point in names or item.point == output]
            for step, given in zip(steps, inputs, strict=True):
                session.decode(given, step.first, wanted, _tee(outputs, output, names, emitter, step))
                if last:
                    logits.append(session.logits())
        return outputs, logits

    def _own(self, known: Sequence[Planned], window: Window) -> list[Planned]:
        """The values without a later window's embedding and an earlier one's output, which are not values of the model."""
        kept: list[Planned] = []
        seen_layer = False
        for item in known:
            layered = points.parse(item.point).layer is not None
            seen_layer = seen_layer or layered
            if layered or (window.stop == self.contents.layers if seen_layer else window.first == 0):
                kept.append(item)
        return kept


def _local(tokens: Sequence[int], ids: Sequence[int], n_vocab: int) -> tuple[int, ...]:
    """The tokens as row numbers of the first window's embedding."""
    place = {number: row for row, number in enumerate(vocabulary_of(ids, n_vocab))}
    return tuple(place[token] for token in tokens)


def _tee(
    outputs: list[NDArray[np.float32]], output: str, names: set[str], emitter: Emitter | None, step: EmittedPass
) -> Deliver:
    """A function that keeps the window's output for the next window and records what was asked for."""
    if emitter is not None:
        emitter.step = step

    def deliver(planned: Planned, value: NDArray[np.float32]) -> None:
        if planned.point == output:
            outputs.append(value.reshape(len(step.tokens), -1).copy())
        if emitter is not None and planned.point in names:
            emitter(planned, value)

    return deliver


def dump_windows(
    library: Library, vocabulary: Model, contents: Contents, job: DumpJob, size: int, started: float
) -> DumpResult:
    """Dump a model of which only `size` layers at a time are in memory."""
    check(job, vocabulary)
    info = dump.describe(contents, library)
    spans = [(first, min(first + size, contents.layers)) for first in range(0, contents.layers, size)]
    from .window_proof import prove

    try:
        proof = prove(library, contents, spans, job.tokens)
    except InputError as error:
        raise error if job.window != "auto" or error.code != "window" else _no_room(contents, error) from error
    sweep = _Sweep(library, contents, job, spans, proof)
    known = [item.point for item in proof.whole.known]
    generates(proof.whole, job, info)
    names = points.select(dump.expression(job, contents.layers), known, contents.layers)
    planned_at = time.perf_counter()
    follow = list(job.lead or ())
    for _ in range(job.generate):
        choice = int(sweep.run(steps_of(job.tokens, follow, job.first_position), set(), None)[-1].argmax())
        follow.append(choice)
        if vocabulary.ends(choice):
            break
    steps = steps_of(job.tokens, follow, job.first_position)
    pieces = job.pieces or vocabulary.pieces(job.tokens)
    made_from = dataflow(proof.whole.nodes, proof.whole.planned)
    header = dump.header_of(job, info, pieces, library, size, made_from, contents.attention_window)
    with open_dump(job.out, header, binary=job.binary) as writer, dump.tensors_beside(job) as tensors:
        logits = sweep.run(steps, set(names), Emitter(writer, job, tensors, causal=proof.whole.causal))
        for i, token in enumerate(follow):
            writer.token(dump.token_record(vocabulary, job.first_position + len(job.tokens) + i, token, logits[i]))
    return DumpResult(
        out=job.out,
        header=header,
        model=info,
        computed=job.model,
        n_layers=contents.layers,
        points=tuple(names),
        records=writer.checkpoints,
        generated=tuple(follow),
        chosen=tuple(int(row.argmax()) for row in logits[: len(follow)]),
        pieces=pieces,
        window=size,
        tensors=beside(job.out) if job.full else None,
        timings={"prepare": planned_at - started, "compute": time.perf_counter() - planned_at},
    )
