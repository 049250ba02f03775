"""Turns values, as they are computed, into records of a dump."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from checkpoints import points
from checkpoints.jsonl import Writer
from checkpoints.recording import passes
from checkpoints.summary import summarise
from checkpoints.tensors import TensorWriter, key

from .jobs import DumpJob
from .naming import Planned
from .rows import arrange


class EmittedPass(Struct, frozen=True):
    """One forward pass: its number, its first position, its tokens."""

    number: int
    first: int
    tokens: tuple[int, ...]

    @property
    def decode(self) -> bool:
        """False for the prompt's pass."""
        return self.number > 0

    @property
    def positions(self) -> NDArray[np.int64]:
        """int64 [T]."""
        return np.arange(self.first, self.first + len(self.tokens), dtype=np.int64)


def steps_of(prompt: Sequence[int], follow: Sequence[int], first: int = 0, portions: tuple[int, ...] = ()) -> list[EmittedPass]:
    """The prompt in one pass or in portions, then each further token in a pass of its own; the first token has position `first`.

    Raises:
        InputError: the portions do not add up to the prompt.
    """
    parts = [tuple(prompt[part]) for part in passes(len(prompt), portions)] + [(token,) for token in follow]
    starts = accumulate((len(part) for part in parts), initial=first)
    return [EmittedPass(number, start, part) for number, (start, part) in enumerate(zip(starts, parts, strict=False))]


class Emitter(Struct):
    """Turns values into records (and whole tensors) as they come; `step` is set before each forward pass.

    `first` is where the sequence begins, if that is not the job's first position; `causal` says whether earlier positions do not
    see later ones; `before` is how many rows of other sequences precede this one's in a pass.
    """

    writer: Writer
    job: DumpJob
    tensors: TensorWriter | None = None
    step: EmittedPass = field(default_factory=lambda: EmittedPass(0, 0, ()))
    first: int | None = None
    causal: bool = True
    before: int = 0

    def __call__(self, planned: Planned, value: NDArray[np.float32]) -> None:
        """Record one value; called inside llama.cpp's callback."""
        step, keep = self.step, self._kept()
        positions = step.positions
        if planned.once:  # it belongs to the last position of the pass
            keep, positions = keep[keep == len(positions) - 1] * 0, positions[-1:]
        if not len(keep):
            return
        begin = self.first if self.first is not None else self.job.first_position
        rows_of_pass = self.before + len(step.tokens)
        tensor = arrange(planned, value, rows_of_pass, step.first - begin + rows_of_pass)
        if self.before:
            tensor = tensor[:, self.before :, self.before :] if points.of_scores(planned.point) else tensor[self.before :]
        source = planned.node if planned.operand is None else planned.node.sources[planned.operand]
        rows = summarise(
            planned.point,
            tensor,
            positions,
            step=step.number,
            decode=step.decode,
            slice_size=self.job.slice_size,
            keep=keep,
            first=begin,
            causal=self.causal,
            dtype=source.type,
        )
        self.writer.rows(rows)
        if self.tensors is not None:
            self.tensors.add(key(planned.point, step.number), tensor)

    def _kept(self) -> NDArray[np.int64]:
        count = len(self.step.tokens)
        if self.job.positions == "all":
            return np.arange(count, dtype=np.int64)
        if self.job.positions == "last":
            return np.array([count - 1], dtype=np.int64)
        return np.flatnonzero(np.isin(self.step.positions, np.array(self.job.positions))).astype(np.int64)
