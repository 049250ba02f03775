"""Whole values: how far apart two of them are, row by row, and where a dump has them.

A dump has whole values in the safetensors file beside it, or in records that carry all of their values.
"""

import re
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.errors import DumpError, ModelError
from checkpoints.formats import load
from checkpoints.mapping import Mapping
from checkpoints.points import ENCODER, of_scores, order, parse
from checkpoints.record import Dump, Rows
from checkpoints.tensors import TensorReader, beside

from ..diff.measured.slices import without_subnormal

Floats = NDArray[np.float64]

# The divisor of a row's error is at least this share of the mean energy of all rows: single rows of scores can be nearly
# zero by chance. Measured on the embedded model, 32 tokens: without it the worst right operation has 3e-13, with it the same;
# it is a precaution for other models.
ROW_FLOOR = 0.01

CACHED = ("k_read", "v_read")  # kinds of points whose rows are the cache's, not the pass's


class RecordedValue(Struct, frozen=True):
    """One point's value in one forward pass, with the positions of its rows: [T, …], [H, T, S], or [S, K·d] if read from the cache."""

    data: NDArray[Any]
    positions: NDArray[np.int64]


def rows_at(name: str, value: RecordedValue, positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """The rows of a value at given positions: [T, n], or [H, T, S] for scores."""
    rows = np.searchsorted(value.positions, positions)
    if of_scores(name):
        return value.data if len(rows) == len(value.positions) else value.data[:, rows]
    data = value.data if value.data.ndim == 1 else value.data.reshape(len(value.positions), -1)
    return data if len(rows) == len(value.positions) else data[rows]


def seen_scores(scores: NDArray[Any], positions: NDArray[np.int64]) -> NDArray[Any]:
    """Scores [H, T, S] of these positions [T] with 0 in place of those of later positions, which the mask covers."""
    first = int(positions[-1]) + 1 - scores.shape[2]
    seen = np.arange(scores.shape[2])[None, None, :] <= (positions - first)[None, :, None]
    return np.where(seen, scores, 0)


def row_errors(
    name: str,
    ours: NDArray[np.float32],
    dumped: NDArray[np.float32],
    positions: NDArray[np.int64],
    least: Floats | None = None,
) -> Floats:
    """NMSE of each row (position), with max(the row's energy, 1 % of the mean, the row's `least`) as divisor: float64 [rows].

    In `kq` only scores of positions up to the row's own are compared: masked scores are ignored. So they are in what is made of it before
    the soft max, if the dump has none there.

    Raises:
        ModelError: the shapes differ.
    """
    kind = parse(name).kind
    if of_scores(name):
        if ours.shape == dumped.shape and not kind.startswith("kq_soft_max"):
            seen = seen_scores(dumped, positions)
            if kind == "kq" or np.array_equal(seen, dumped):
                ours, dumped = seen_scores(ours, positions), seen
        ours, dumped = ours.transpose(1, 0, 2), dumped.transpose(1, 0, 2)
    if ours.shape[0] != dumped.shape[0] or ours.size != dumped.size:
        raise ModelError(f"{kind} has shape {list(dumped.shape)}, the model's is {list(ours.shape)}.", "Is it of this model?")
    a = ours.reshape(len(ours), -1).astype(np.float64)
    b = dumped.reshape(len(dumped), -1).astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    nonfinite = (~np.isfinite(a) | ~np.isfinite(b)) & ~same
    with np.errstate(invalid="ignore"):
        delta = without_subnormal(np.where(same | nonfinite, 0.0, a - b))
    b = np.where(np.isfinite(b), b, 0.0)
    energy = np.einsum("ij,ij->i", b, b)
    error = np.einsum("ij,ij->i", delta, delta)
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.maximum(ROW_FLOOR * energy.mean(), 0.0 if least is None else least)
        nmse = np.where(error == 0, 0.0, error / np.maximum(energy, floor))
    return np.where(nonfinite.any(axis=1), np.inf, nmse)


class WholeValues:
    """A dump's values that were recorded whole, pass by pass; each is read on demand.

    Args:
        path: the dump, in any format; its tensors are looked for beside it, or in `tensors`.
        mapping: the meaning of its names.

    Raises:
        DumpError: there is no such dump, it has several sequences, or a tensors file cannot be read.
    """

    def __init__(self, path: Path, tensors: Path | None = None, mapping: Mapping | None = None) -> None:
        self.path = path
        # The beginnings of names of which scores see later positions: up to their own they are not whole.
        self.two_sided: tuple[str, ...] = ()
        self.dump: Dump = load(path, mapping)
        file = tensors or beside(path)
        self._reader = TensorReader(file) if tensors is not None or file.exists() else None
        self.sequences = sorted({int(seq) for rows in self.dump.points.values() for seq in np.unique(rows.seq)})
        self._rows = {name: rows.take(np.flatnonzero(rows.seq == self.sequences[0])) for name, rows in self.dump.points.items()}
        self._tensors: set[tuple[str, int]] = set()
        for name in self._reader.names if self._reader is not None else ():
            if numbered := re.fullmatch(r"(.*)/(\d{1,9})", name, re.DOTALL):
                self._tensors.add((numbered[1], int(numbered[2])))
        self.passes = sorted({int(step) for rows in self._rows.values() for step in np.unique(rows.step)})
        # A pass's positions are those at which any point was recorded; an encoder's are the prompt's, its decoder has its own.
        self._positions = {
            (step, encoder): np.unique(
                np.concatenate(
                    [np.zeros(0, dtype=np.int64)]
                    + [
                        rows.token_idx[rows.step == step]
                        for name, rows in self._rows.items()
                        if name.startswith(ENCODER) == encoder
                    ]
                )
            )
            for step in self.passes
            for encoder in (False, True)
        }

    @property
    def unshaped(self) -> bool:
        """Whether some records do not state the shape of their row: bare lines, whose completeness only the model can tell."""
        return any(() in rows.shapes for rows in self._rows.values())

    def with_shapes(self, shapes: dict[str, tuple[str, ...]]) -> None:
        """Regard records without a shape as whole if they have as many values as the model's row of that point.

        Args:
            shapes: point -> the shape of its row as text, "t+1" for the positions seen so far.
        """
        first = min((int(rows.token_idx.min()) for rows in self._rows.values() if len(rows)), default=0)
        for name, rows in self._rows.items():
            if name not in shapes or rows.indices is not None:
                continue
            shaped = []
            for shape, position, count in zip(rows.shapes, rows.token_idx.tolist(), rows.counts.tolist(), strict=True):
                known = tuple(position - first + 1 if size == "t+1" else int(size) for size in shapes[name])
                shaped.append(known if shape == () and prod(known) == count else shape)
            self._rows[name] = replace(rows, shapes=tuple(shaped))
        self.dump = replace(self.dump, points={**self.dump.points, **self._rows})

    def positions(self, step: int) -> NDArray[np.int64]:
        """The positions of a forward pass that is not an encoder's, int64 [T]."""
        return self._positions[step, False]

    @property
    def first(self) -> int:
        """The first position of all passes."""
        return next((int(rows[0]) for step in self.passes if len(rows := self.positions(step))), 0)

    def points(self, step: int) -> list[str]:
        """The points that were recorded whole in a pass, in the order of the model."""
        named = {point for point, number in self._tensors if number == step}
        named |= {name for name, rows in self._rows.items() if (rows.full() & (rows.step == step)).any()}
        return order(named)

    @property
    def generated(self) -> NDArray[np.int64]:
        """The ids that were generated after the prompt."""
        return np.array([token.id for token in self.dump.tokens], dtype=np.int64)

    def prompt(self) -> NDArray[np.int64]:
        """The ids of the prompt.

        Raises:
            DumpError: the dump does not list them.
        """
        header = self.dump.header
        if header is None or not header.tokens:
            raise DumpError(
                f"{self.path} does not say which tokens it was recorded for.", "Give --tokens or --prompt.", code="tokens"
            )
        return np.array(header.tokens, dtype=np.int64)

    def arriving(self, step: int, computed: Sequence[str], *, encoder: bool = False) -> Iterator[tuple[str, RecordedValue]]:
        """The whole values of a pass, one after the other: only an encoder's, or all others.

        They come in the order in which they are `computed`, whatever the dump's: a wrong record is known before its readers are judged.
        """
        place = {name: number for number, name in enumerate(computed)}
        for name in sorted(self.points(step), key=lambda name: place.get(name, len(place))):
            if name.startswith(ENCODER) != encoder:
                continue
            value = self.get(name, step)
            if value is not None:
                yield name, value

    def get(self, name: str, step: int) -> RecordedValue | None:
        """A point's whole value in a pass, None if it was not recorded.

        Raises:
            DumpError: a tensor does not have a row for each position of its pass.
        """
        if (name, step) in self._tensors and self._reader is not None:
            return self._from_tensor(name, step)
        rows = self._rows.get(name)
        if rows is None:
            return None
        whole = rows.full() & (rows.step == step)
        if of_scores(name) and name.startswith(self.two_sided):
            length = len(self._positions[step, name.startswith(ENCODER)])
            whole &= all(shape[-1:] == (length,) for shape in rows.shapes)
        rows = rows.take(np.flatnonzero(whole))
        # Scores are as long as the pass has positions, though the last ones may not be whole: later ones are masked.
        seen = 0 if name.startswith(ENCODER) else int(self.positions(step).max(initial=-1)) + 1 - self.first
        return _from_rows(name, rows, seen) if len(rows) else None

    def _from_tensor(self, name: str, step: int) -> RecordedValue:
        data = self._reader.get(name, step).astype(np.float32) if self._reader is not None else np.zeros(0, np.float32)
        positions = self._positions[step, name.startswith(ENCODER)]
        kind = parse(name).kind
        if data.ndim < 2 or (of_scores(name) and data.ndim != 3):
            raise DumpError(
                f"{name} of pass {step} has shape {list(data.shape)} in the tensors file.",
                "Write [positions, …], and [heads, positions, cached positions] for kq and kq_soft_max.",
            )
        count = data.shape[1] if of_scores(name) else len(data)
        if count == 1 and kind not in CACHED:  # a state after the pass, or a pooled embedding
            return RecordedValue(data, positions[-1:])
        if kind not in CACHED and count != len(positions):
            raise DumpError(
                f"{name} of pass {step} has {count} rows in the tensors file, but {len(positions)} positions in the dump.",
                "Record all positions (--positions all), or use the tensors file of this dump.",
            )
        return RecordedValue(data, positions)


def _as_all_show(rows: Rows) -> NDArray[np.float32]:
    """What a cache gave the last of these positions; where an earlier one's record has another number, that one, so that it is judged."""
    last = rows.values[-1, : int(rows.counts[-1])]
    shown = last.copy()
    for values, count in zip(rows.values[:-1], rows.counts[:-1].tolist(), strict=True):
        size = min(count, len(last))
        np.copyto(shown[:size], values[:size], where=values[:size] != last[:size])
    return shown


def _from_rows(name: str, rows: Rows, length: int) -> RecordedValue:
    """The value of records that contain all of their values, as one array; scores have at least this length."""
    rows = rows.take(np.argsort(rows.token_idx, kind="stable"))
    kind = parse(name).kind
    if kind in CACHED:  # the last position's record holds all rows
        count = rows.shapes[-1][0] if len(rows.shapes[-1]) > 1 else 1
        return RecordedValue(_as_all_show(rows).reshape(count, -1), rows.token_idx)
    if of_scores(name):
        one_head = len(rows.shapes[-1]) == 1  # scores by which sparse attention chooses its keys
        heads, seen = 1 if one_head else rows.shapes[-1][0], max(length, *(shape[-1] for shape in rows.shapes))
        # Later positions are masked: those scores are made with the mask in them.
        masked = -np.inf if one_head else 0.0
        data = np.full((heads, len(rows), seen), masked, dtype=np.float32)
        for r, shape in enumerate(rows.shapes):
            data[:, r, : shape[-1]] = rows.values[r, : int(rows.counts[r])].reshape(heads, -1)
        return RecordedValue(data, rows.token_idx)
    return RecordedValue(rows.values, rows.token_idx)
