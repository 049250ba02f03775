"""The inputs that llama.cpp gives a graph (masks, positions, cache indices, output ids), as rules that depend on tokens and
positions.
A rule is a function of one pass. It is accepted only if it reproduces the recorded data of every pass (`explain`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from .graph import InputRule

Values = NDArray[Any]
UNDEFINED = "undefined"  # the rule of memory that a graph only takes the shape of: it has no values


class ForwardPass(Struct, frozen=True):
    """One forward pass: ids and positions of its T tokens, and the positions of the S keys that the cache holds after it.

    `encoded` is what an encoder left for this pass of a decoder: float32 [E, D].
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    keys: NDArray[np.int64]
    encoded: NDArray[np.float32] | None = None


class Recorded(Struct, frozen=True):
    """The data of one input in one pass, flat, and its `ne`."""

    now: ForwardPass
    ne: tuple[int, ...]
    data: Values


def visible(positions: Values, keys: Values, *, window: str, size: int) -> Values:
    """Which keys each query sees: [T], [S] -> bool [T, S].

    Windows are llama.cpp's (`llama_hparams::is_masked_swa`): "causal" sees all earlier positions, "standard" the last `size`, itself
    included; "chunked" those of its own chunk of `size`; "symmetric" `size / 2` on both sides; "all" everything.
    """
    query, key = positions[:, None], keys[None, :]
    if window == "all":
        everything: Values = abs(query - key) >= 0
        return everything
    if window == "symmetric":
        near: Values = abs(query - key) <= size // 2
        return near
    earlier: Values = key <= query
    if window == "standard":
        return earlier & (query - key < size)
    if window == "chunked":
        return earlier & (key >= query // size * size)
    return earlier


def _tokens(now: ForwardPass) -> Values:
    return now.tokens


def _positions(now: ForwardPass, *, sections: int = 1, zeros: int = 0) -> Values:
    """The positions; with M-RoPE once for each section, the last `zeros` of which are zero for text."""
    return np.concatenate([now.positions] * (sections - zeros) + [np.zeros_like(now.positions)] * zeros)


def _rows(now: ForwardPass) -> Values:
    """0 … T − 1: all rows of the pass."""
    return np.arange(len(now.tokens))


def _cells(now: ForwardPass) -> Values:
    """The cache cells that this pass fills: the last T."""
    return np.arange(len(now.keys) - len(now.tokens), len(now.keys))


def _cells_transposed(now: ForwardPass, *, cells: int, width: int) -> Values:
    """`_cells` if each channel has a row of the cache: channel · cells + cell."""
    return (_cells(now)[:, None] + np.arange(width)[None, :] * cells).reshape(-1)


def _zero(now: ForwardPass) -> Values:
    return np.zeros(1)


def _last(now: ForwardPass) -> Values:
    """The index of the last row."""
    return np.array([len(now.tokens) - 1])


def _mean(now: ForwardPass) -> Values:
    """1 / T for each row: the mean over the pass."""
    return np.full(len(now.tokens), np.float32(1) / np.float32(len(now.tokens)), np.float32)


def buckets(positions: Values, keys: Values, *, count: int, bidirectional: bool) -> Values:
    """T5's bucket of each distance: [T], [S] -> int32 [T, S]. Mirrors llama_relative_position_bucket, in float32 and double as there."""
    count = count // 2 if bidirectional else count
    exact = count // 2
    relative = keys[None, :] - positions[:, None]
    before = np.where(relative > 0, count, 0) if bidirectional else np.zeros_like(relative)
    distance = abs(relative) if bidirectional else -np.minimum(relative, 0)
    with np.errstate(divide="ignore"):
        steps = np.log((distance / exact).astype(np.float32)) * np.float32(count - exact) / np.log(128 / exact)
    far = np.minimum(np.floor((exact + np.maximum(steps, -exact)).astype(np.float32)), count - 1)
    numbers: Values = (before + np.where(distance < exact, distance, far)).astype(np.int32)
    return numbers


def _buckets(now: ForwardPass, *, count: int, bidirectional: bool) -> Values:
    return buckets(now.positions, now.keys, count=count, bidirectional=bidirectional)


def hadamard(size: int) -> Values:
    """Sylvester's matrix of ±1 over the root of its size: float32 [size, size]. Mirrors llama_kv_cache's rotation of keys."""
    matrix: Values = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: Values = (matrix / np.sqrt(np.float32(size))).astype(np.float32)
    return scaled


def _hadamard(now: ForwardPass, *, size: int) -> Values:
    return hadamard(size)


def _mask(now: ForwardPass, *, window: str, size: int = 0, alibi: bool = False) -> Values:
    """0 (with ALiBi minus the distance) where a key is seen, −∞ elsewhere: [T, S]."""
    seen = visible(now.positions, now.keys, window=window, size=size)
    distance = -abs(now.positions[:, None] - now.keys[None, :]).astype(np.float32)
    return np.where(seen, distance if alibi else np.float32(0), np.float32(-np.inf))


def temperature(positions: Values, *, floor: int, scale: float, offset: float) -> Values:
    """log(⌊(position + offset) / floor⌋ + 1) · scale + 1: [T]. Mirrors llm_graph_input_attn_temp::set_input."""
    steps = np.floor((positions.astype(np.float32) + np.float32(offset)) / np.float32(floor))
    factors: Values = (np.log(steps + np.float32(1)) * np.float32(scale) + np.float32(1)).astype(np.float32)
    return factors


def _temperature(now: ForwardPass, *, floor: int, scale: float, offset: float) -> Values:
    return temperature(now.positions, floor=floor, scale=scale, offset=offset)


def _encoded(now: ForwardPass) -> Values:
    """The encoder's output."""
    return np.zeros((0, 0), np.float32) if now.encoded is None else now.encoded


def _sees_encoded(now: ForwardPass) -> Values:
    """The mask of a decoder that sees every row of the encoder's output: zeros [T, E]."""
    return np.zeros((len(now.tokens), len(_encoded(now))), np.float32)


def slopes(heads: int) -> Values:
    """How fast each head of lightning attention forgets, by ALiBi's slopes: float32 [heads]. Mirrors llm_graph_input_la::set_input."""
    two = np.float32(2)
    start = two ** -(two ** -(np.log2(np.float32(heads)) - np.float32(3)))
    numbers: Values = (start * start ** np.arange(heads, dtype=np.float32)).astype(np.float32)
    return numbers


def _slopes(now: ForwardPass, *, heads: int) -> Values:
    return slopes(heads)


def decay(count: int, *, heads: int, of: str) -> Values:
    """Minus the slopes times a distance in a pass of `count` tokens: "query" to the tokens before the pass, "key" to its last token,
    both [T, heads], "pair" from key to query, [heads, T, T], −∞ for later keys."""
    row = np.arange(count, dtype=np.float32)
    if of == "pair":
        distance = row[:, None] - row[None, :]
        return np.where(distance >= 0, -slopes(heads)[:, None, None] * distance, np.float32(-np.inf))
    numbers: Values = -slopes(heads)[None, :] * (row + 1 if of == "query" else count - 1 - row)[:, None]
    return numbers


def _decay(now: ForwardPass, *, heads: int, of: str) -> Values:
    return decay(len(now.tokens), heads=heads, of=of)


RULES: dict[str, Callable[..., Values]] = {
    "tokens": _tokens,
    "positions": _positions,
    "rows": _rows,
    "cells": _cells,
    "cells_transposed": _cells_transposed,
    "zero": _zero,
    "hadamard": _hadamard,
    "buckets": _buckets,
    "last": _last,
    "mean": _mean,
    "mask": _mask,
    "temperature": _temperature,
    "encoded": _encoded,
    "sees_encoded": _sees_encoded,
    "slopes": _slopes,
    "decay": _decay,
}


def explain(recorded: Sequence[Recorded], facts: Mapping[str, Any], first: Sequence[InputRule] = ()) -> InputRule | None:
    """The first rule that reproduces the recorded data of every pass, or None; those in `first` are tried first.

    `facts` are the model's metadata without the architecture's prefix, which hold the parameters of temperatures.
    """
    return next(
        (rule for rule in (*first, *_candidates(recorded, facts)) if all(_gives(rule, entry) for entry in recorded)), None
    )


def _with_its_keys(entry: Recorded) -> Recorded:
    """The passes with their own keys, for inputs over as many keys as tokens: nothing is read from a cache there."""
    if entry.ne[0] != len(entry.now.tokens):
        return entry
    return replace(entry, now=replace(entry.now, keys=entry.now.positions))


def _gives(rule: InputRule, entry: Recorded) -> bool:
    now = _with_its_keys(entry).now if rule.kind in ("mask", "buckets") else entry.now
    values = RULES[rule.kind](now, **rule.parameters)
    if rule.kind == "mask":
        # The cache's padding is masked; so are rows that pad the pass.
        columns, rows = entry.ne[:2]
        padded = np.full((rows, columns), -np.inf, np.float32)
        if values.shape[0] > rows or values.shape[1] > columns:
            return False
        padded[: values.shape[0], : values.shape[1]] = values
        values = padded
    if rule.kind == "buckets" and values.ndim == 2 and values.shape[1] < entry.ne[0]:
        # Those of the cache's padding say nothing: its scores are masked.
        data = entry.data.reshape(-1, entry.ne[0])[: len(values), : values.shape[1]]
        return bool(np.array_equal(values, data))
    flat = values.reshape(-1)
    if flat.shape != entry.data.shape:
        return False
    if entry.data.dtype.kind == "f" and rule.kind in ("temperature", "hadamard", "slopes", "decay"):
        return bool(
            np.allclose(flat, entry.data, rtol=1e-6, atol=0)
        )  # logf and powf of libm and of NumPy, another order of division
    return bool(np.array_equal(flat, entry.data))


def _candidates(recorded: Sequence[Recorded], facts: Mapping[str, Any]) -> list[InputRule]:
    first = recorded[0]
    count = len(first.now.tokens)
    if first.data.dtype.kind == "f":
        masks = [InputRule("mask", {"window": kind, "size": size}) for kind, size in _windows(recorded)]
        masks += [InputRule("mask", {**rule.parameters, "alibi": True}) for rule in masks]
        lengths = (facts.get("attention.temperature_length"), facts.get("rope.scaling.original_context_length"), 8192)
        floors = dict.fromkeys(
            int(length) for length in lengths if length
        )  # which of them an architecture takes, its data tell
        scale = facts.get("attention.temperature_scale") or 0.1
        square = first.ne[0] == first.ne[1] and first.ne[0] & (first.ne[0] - 1) == 0
        from_encoder = [InputRule("encoded"), InputRule("sees_encoded")] if first.now.encoded is not None else []
        return [
            *from_encoder,
            InputRule("mean"),
            *([InputRule("hadamard", {"size": first.ne[0]})] if square else []),
            *masks,
            *_of_lightning_attention(first),
            *(InputRule("temperature", {"floor": n, "scale": float(scale), "offset": o}) for n in floors for o in (0.0, 1.0)),
        ]
    rules = [
        InputRule("tokens"),
        InputRule("rows"),
        InputRule("cells"),
        InputRule("positions"),
        InputRule("zero"),
        InputRule("last"),
    ]
    if first.ne[1] == count:
        number = int(facts.get("attention.relative_buckets_count") or 32)
        rules += [InputRule("buckets", {"count": number, "bidirectional": both}) for both in (True, False)]
    if first.ne[0] == 4 * count:
        rules += [InputRule("positions", {"sections": 4, "zeros": zeros}) for zeros in (1, 0)]
    if first.ne[0] % count == 0 and first.data.size > count:
        width = first.ne[0] // count
        rules.append(InputRule("cells_transposed", {"cells": int(first.data[1] - first.data[0]), "width": width}))
    return rules


def _of_lightning_attention(entry: Recorded) -> list[InputRule]:
    """The slopes and decays that an input of this shape can be."""
    ne, count = entry.ne, len(entry.now.tokens)
    rules = [InputRule("slopes", {"heads": ne[0]})] if ne[1:] == (1, 1, 1) else []
    if ne == (1, ne[1], count, 1):
        rules += [InputRule("decay", {"heads": ne[1], "of": of}) for of in ("query", "key")]
    if ne == (count, count, ne[2], 1):
        rules.append(InputRule("decay", {"heads": ne[2], "of": "pair"}))
    return rules


def _windows(recorded: Sequence[Recorded]) -> list[tuple[str, int]]:
    """The kinds and sizes of windows that the recorded masks can have, by the farthest key that a query sees."""
    candidates: list[tuple[str, int]] = [("causal", 0), ("all", 0)]
    back, chunks = 0, set[int]()
    for entry in map(_with_its_keys, recorded):
        if entry.data.size < len(entry.now.positions) * entry.ne[0]:
            continue
        rows = np.isfinite(entry.data.reshape(-1, entry.ne[0]))[: len(entry.now.positions), : len(entry.now.keys)]
        if not rows.any(axis=1).all():
            continue
        farthest = entry.now.keys[rows.argmax(axis=1)]
        back = max(back, int((entry.now.positions - farthest).max()))
        chunks.update(int(key) for key in farthest if key > entry.now.keys[0])
    candidates += [("standard", back + 1), ("symmetric", 2 * back)]
    sizes = sorted({start // part for start in chunks for part in range(1, 65) if start % part == 0}, reverse=True)
    return candidates + [("chunked", size) for size in sizes if size > 1]
