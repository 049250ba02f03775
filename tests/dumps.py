"""Dumps made from arrays, for tests of code that works on dumps."""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.record import Dump, End, Header, ModelInfo, Rows, Token
from checkpoints.summary import summarise

Arrays = dict[str, NDArray[np.float32]]
DEFAULT = ("embd", "blk.0.l_out", "blk.5.l_out", "blk.10.l_out", "blk.23.l_out", "output_norm", "logits")
WIDTH = 64
# What the JSON of a comparison promises: docs and other programs rely on these keys.
VERDICT_KEYS = {"verdict", "compared", "mode", "limit", "worst", "first_divergence", "origins", "last_agreement", "next"}
VERDICT_KEYS |= {"pattern", "missing"}
DIFFERENCE_KEYS = {"checkpoint", "layer", "token_idx", "nmse", "max_abs", "limit", "ours", "ref", "fresh"}
HEADER = Header(
    source="engine",
    model=ModelInfo("tiny", "qwen2", "F32", 24, "f00d"),
    tokens=(),
    prompt="a prompt",
    mode="exact",
    compute="f32",
    kv_type="f32",
)


def random(points: Sequence[str] = DEFAULT, positions: int = 12, seed: int = 0) -> Arrays:
    """Normal rows of 64 for each point."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((positions, WIDTH)).astype(np.float32) for name in points}


def noisy(arrays: Arrays, size: float = 1e-7, seed: int = 1) -> Arrays:
    """The same with relative noise, as in a right float32 engine; the embedding is exact."""
    rng = np.random.default_rng(seed)
    noisy_arrays = {name: (x * (1 + size * rng.standard_normal(x.shape))).astype(np.float32) for name, x in arrays.items()}
    return {name: arrays[name] if name == "embd" else x for name, x in noisy_arrays.items()}


def spoiled(arrays: Arrays, points: Sequence[str], positions: Sequence[int] | slice, size: float = 0.03) -> Arrays:
    """The same, wrong at these points and positions."""
    rng = np.random.default_rng(2)
    changed_arrays = {name: x.copy() for name, x in arrays.items()}
    for name in points:
        changed_arrays[name][positions] += (size * rng.standard_normal(changed_arrays[name][positions].shape)).astype(
            np.float32
        )
    return changed_arrays


def dump(
    arrays: Mapping[str, NDArray[np.float32]],
    *,
    path: str = "dump.jsonl",
    header: Header | None = HEADER,
    prefill: int | None = None,
    chunk: int | None = None,
    slice_size: int | None = 16,
    tokens: tuple[Token, ...] = (),
) -> Dump:
    """A dump of arrays [T, …]; positions from `prefill` on are decode steps, `chunk` cuts the prefill into passes."""
    points = {name: _rows(name, array, prefill, chunk, slice_size) for name, array in arrays.items()}
    if header is not None and not header.tokens:
        header = replace(header, tokens=tuple(range(100, 100 + len(next(iter(arrays.values()))))))
    return Dump(path, header, points, tokens, End(0))


def _rows(name: str, array: NDArray[np.float32], prefill: int | None, chunk: int | None, size: int | None) -> Rows:
    rows = summarise(name, array, np.arange(len(array)), slice_size=size)
    if chunk is not None:
        rows = replace(rows, step=rows.token_idx // chunk)
    if prefill is not None:
        decode = rows.token_idx >= prefill
        rows = replace(rows, decode=decode, step=np.where(decode, rows.token_idx - prefill + 1, 0))
    return rows
