"""What a dump holds: Header, rows of checkpoints, Token, End. One JSON line each; format version 1.

`Rows` is the columnar form of checkpoint records: one row per record, all of one point. The engine writes one `Rows` per point
and step; a reader returns one per point for the whole dump, so that everything that works on dumps works on arrays.
"""

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any, Self

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace
from numpy.typing import NDArray

FORMAT = 1
DEFAULT_SLICE = 16  # leading values: a row fills a line of a screen; what lies outside of them the sketch sees
SKETCH_SIZE = 32  # projections: the squared distance to √(2/32) = 25 %
ATTENTION_WINDOW = "attention_window"  # of a header's `hparams`: positions that attention sees, in layers with a window
PREFILL = "prefill"
DECODE = "decode"


class ModelInfo(Struct, frozen=True):
    """The model that a dump was made with.

    `fingerprint` is `checkpoints.fingerprint.fingerprint` of the original file, which reads parts of it, `content` is
    `checkpoints.content.content_hash`, which reads all; `twin` is the fingerprint of its F32 copy where one was computed: an
    engine that was given the copy names the copy. `weights` are the families of the matrices' types ("f32 quantised"), which
    decide by how much two sides may differ: the file type is only a name that somebody gave to the
    mixture. `settings` is a hash of the metadata that
    the computation depends on, which copies of other types share.
    """

    name: str = ""
    architecture: str = ""
    file_type: str = ""
    layers: int | None = None
    fingerprint: str = ""
    twin: str = ""
    content: str = ""
    weights: str = ""
    settings: str = ""

    def may_be(self, other: "ModelInfo") -> bool:
        """Whether both can describe one file, or a file and its F32 copy, as far as they state it."""
        if not (self.fingerprint and other.fingerprint):
            return True
        if self.fingerprint == other.fingerprint:
            return self.content == other.content or not (self.content and other.content)
        return bool({self.fingerprint, self.twin} & {other.fingerprint, other.twin} - {""})


class Header(Struct, frozen=True):
    """The first line of a dump: everything that could explain a difference later.

    `tokens` are the ids of the prompt, `pieces` their texts; `compute` is the arithmetic (f32, tf32, f16, bf16),
    `mode` "exact" or "native", `slice` the number of leading values in each record, `dataflow` what each point is made from
    (`checkpoints.dataflow.Dataflow.to_json`; {} if only the order of points is known), `columns` where the records lie as arrays beside
    the lines (`checkpoints.columns`).
    """

    source: str
    model: ModelInfo = field(default_factory=ModelInfo)
    tokens: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    prompt: str | None = None
    mode: str = ""
    compute: str = ""
    kv_type: str = ""
    slice: int = DEFAULT_SLICE
    hparams: dict[str, Any] | None = None
    dataflow: dict[str, Any] | None = None
    columns: dict[str, Any] | None = None
    build: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    format: int = FORMAT


class Token(Struct, frozen=True):
    """One generated token: `token_idx` is the position it will stand at, `top` the largest logits as (id, value)."""

    token_idx: int
    id: int
    text: str = ""
    top: tuple[tuple[int, float], ...] = ()
    seq: int = 0

    @property
    def first_choice(self) -> int:
        """The side's own first choice; if it is led along another side's tokens, `top` lists it."""
        return self.top[0][0] if self.top else self.id


class End(Struct, frozen=True):
    """The last line of a dump that was written to its end: how many lines of each kind came before it."""

    checkpoints: int
    tokens: int = 0


STATISTICS = ("n", "sum", "l2", "min", "max", "nonfinite", "absmax_at", "future_mass")
_INTEGER_STATISTICS = frozenset({"n", "nonfinite", "absmax_at"})


def statistic_as_json(name: str, value: float) -> int | float:
    """Counts and indices as integers, everything else as it is."""
    return int(value) if name in _INTEGER_STATISTICS and np.isfinite(value) else float(value)


class Rows(Struct, frozen=True, dict=True):
    """Records of one point, one row each; R rows.

    Attributes:
        point: canonical name.
        seq, token_idx, step: int64 [R]; position in the sequence from 0, number of the forward pass.
        decode: bool [R], False for prefill.
        shapes: the shape of each row of the activation.
        values: float32 [R, k], the slice; rows shorter than k are padded with NaN.
        counts: int64 [R], how many values each row really has.
        stats: name -> float64 [R]; NaN where a record lacks it.
        sketch: float32 [R, 32], or None where no record has one; a row of NaN where a single record lacks it.
        indices: int64 [R, k] of scattered values, -1 where padded, or None for leading values.
        quantum: float64 [R, k], the step of the printed decimals, or None where the text is exact.
    """

    point: str
    seq: NDArray[np.int64]
    token_idx: NDArray[np.int64]
    step: NDArray[np.int64]
    decode: NDArray[np.bool_]
    shapes: tuple[tuple[int, ...], ...]
    values: NDArray[np.float32]
    counts: NDArray[np.int64]
    stats: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    sketch: NDArray[np.float32] | None = None
    indices: NDArray[np.int64] | None = None
    quantum: NDArray[np.float64] | None = None
    dtype: str = "f32"

    def __len__(self) -> int:
        return len(self.token_idx)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_] | Sequence[int]) -> Self:
        """The given rows, in the given order (indices or a mask)."""
        picked = np.arange(len(self))[np.asarray(rows)] if len(self) else np.zeros(0, np.int64)
        return replace(
            self,
            seq=self.seq[picked],
            token_idx=self.token_idx[picked],
            step=self.step[picked],
            decode=self.decode[picked],
            shapes=tuple(self.shapes[i] for i in picked),
            values=self.values[picked],
            counts=self.counts[picked],
            stats={name: column[picked] for name, column in self.stats.items()},
            sketch=None if self.sketch is None else self.sketch[picked],
            indices=None if self.indices is None else self.indices[picked],
            quantum=None if self.quantum is None else self.quantum[picked],
        )

    def full(self) -> NDArray[np.bool_]:
        """bool [R]: rows whose values are the whole activation, not a slice of it."""
        return (self.sizes == self.counts) if self.indices is None else np.zeros(len(self), dtype=np.bool_)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """int64 [R]: the number of elements of each row of the activation; -1 where its shape is not known."""
        if self.shapes and self.shapes.count(self.shapes[0]) == len(self):  # as most are
            return np.full(len(self), prod(self.shapes[0]) if self.shapes[0] else -1, dtype=np.int64)
        known = {shape: prod(shape) if shape else -1 for shape in set(self.shapes)}  # few shapes, many rows
        return np.fromiter(map(known.__getitem__, self.shapes), np.int64, len(self))

    @staticmethod
    def stack(parts: Sequence["Rows"]) -> "Rows":
        """Rows of one point, one after the other; narrower parts are padded.

        Raises:
            ValueError: no parts, or parts of different points.
        """
        if not parts:
            raise ValueError("nothing to stack")
        if len(parts) == 1:
            return parts[0]
        if len({part.point for part in parts}) != 1:
            raise ValueError("rows of different points cannot be stacked")
        width = max(part.values.shape[1] for part in parts)
        names = dict.fromkeys(name for part in parts for name in part.stats)
        return Rows(
            point=parts[0].point,
            seq=np.concatenate([part.seq for part in parts]),
            token_idx=np.concatenate([part.token_idx for part in parts]),
            step=np.concatenate([part.step for part in parts]),
            decode=np.concatenate([part.decode for part in parts]),
            shapes=tuple(shape for part in parts for shape in part.shapes),
            values=np.concatenate([_widen(part.values, width, np.float32(np.nan)) for part in parts]),
            counts=np.concatenate([part.counts for part in parts]),
            stats={
                name: np.concatenate([part.stats.get(name, np.full(len(part), np.nan)) for part in parts]) for name in names
            },
            sketch=_stack_optional([part.sketch for part in parts], parts, SKETCH_SIZE, np.float32(np.nan)),
            indices=_stack_optional([part.indices for part in parts], parts, width, np.int64(-1)),
            quantum=_stack_optional([part.quantum for part in parts], parts, width, np.float64(0)),
            dtype=parts[0].dtype,
        )


def _widen(array: NDArray[Any], width: int, filler: Any) -> NDArray[Any]:
    missing = width - array.shape[1]
    return array if missing == 0 else np.pad(array, ((0, 0), (0, missing)), constant_values=filler)


def _stack_optional(arrays: list[NDArray[Any] | None], parts: Sequence[Rows], width: int, filler: Any) -> NDArray[Any] | None:
    if all(array is None for array in arrays):
        return None
    full = [
        np.full((len(part), width), filler) if array is None else _widen(array, width, filler)
        for array, part in zip(arrays, parts, strict=True)
    ]
    return np.concatenate(full)


class Dump(Struct, frozen=True):
    """A dump that was read: rows by point in the order of first appearance, and what the reader noticed.

    `end` is None for a file that was cut short, `torn` says that its last line was; `skipped` counts lines that were no
    records; `notes` are sentences for the user (a torn last line, records merged, …).
    """

    path: str
    header: Header | None
    points: dict[str, Rows]
    tokens: tuple[Token, ...] = ()
    end: End | None = None
    skipped: int = 0
    notes: tuple[str, ...] = ()
    torn: bool = False

    @property
    def records(self) -> int:
        """How many checkpoint records there are."""
        return sum(len(rows) for rows in self.points.values())
