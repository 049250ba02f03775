"""Edits as tiles, threads and packed layouts make them: the edge of a tile, elements of a register in another order, a race."""

import random
from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from engine import ops
from engine.backend import Array
from engine.graph import Altered, Step, WeightSource

_OF_PRODUCTS = ("last terms left out", "last terms twice", "a tile of the input not cleared")
_OF_WEIGHTS = ("rows of a weight exchanged in pairs", "columns of a weight reversed in fours", "a weight clipped")
_OF_RESULTS = (
    "two positions exchanged",
    "eight elements reversed",
    "small elements as zero",
    "rounded to sixteenths",
    "last position scaled",
    "last tile from the position before",
    "every eighth element halved",
    "largest and smallest exchanged",
)
TILES = (*_OF_PRODUCTS, *_OF_WEIGHTS, *_OF_RESULTS)
_TILE = 16


def tiled(step: Step, how: str, draw: random.Random) -> Step | None:
    """The step with this edit; None where it does not apply. The same draw gives the same edit in every layer."""
    place = draw.randrange(1 << 20)
    if how in _OF_RESULTS:
        return replace(step, op=lambda *x, **params: _result(step.op(*x, **params), how, place)) if step.axis == 0 else None
    if step.op is not ops.linear or not isinstance(step.weights[0], str):
        return None
    if how in _OF_PRODUCTS:
        return replace(step, op=lambda x, *weights: step.op(_input(x, how), *weights))
    return replace(step, weights=(Altered(step.weights[0], _changed(how)), *step.weights[1:]))


def _input(x: Array, how: str) -> Array:
    """What a product reads, [T, in], where its last tile of terms is lost, counted twice, or still has what the position before left."""
    out = x.copy()
    if how == "last terms left out":
        out[:, -_TILE:] = 0
    elif how == "last terms twice":
        out[:, -_TILE:] *= x.dtype.type(2)
    else:
        out[1:, -_TILE:] += x[:-1, -_TILE:]
    return out


def _changed(how: str) -> Callable[[WeightSource, str], Array]:
    def altered(source: WeightSource, name: str) -> Array:
        weight = source.get(name).copy()
        rows, columns = weight.shape[-2] // 2 * 2, weight.shape[-1] // 4 * 4
        if how == "rows of a weight exchanged in pairs":
            weight[:rows] = weight[:rows].reshape(-1, 2, weight.shape[-1])[:, ::-1].reshape(rows, -1)
        elif how == "columns of a weight reversed in fours":
            weight[:, :columns] = weight[:, :columns].reshape(len(weight), -1, 4)[..., ::-1].reshape(len(weight), -1)
        else:
            most = weight.dtype.type(2 * weight.std())
            np.clip(weight, -most, most, out=weight)
        return weight

    return altered


def _result(x: Array, how: str, place: int) -> Array:
    out, count = x.copy(), x.shape[-1]
    at = 1 + place % max(1, len(x) - 1)
    if how == "two positions exchanged":
        out[[at - 1, at]] = x[[at, at - 1]]
    elif how == "eight elements reversed":
        start = 8 * (place % max(1, count // 8))
        out[..., start : start + 8] = x[..., start : start + 8][..., ::-1]
    elif how == "small elements as zero":
        out[np.abs(x) < 0.1 * np.sqrt((x * x).mean())] = 0
    elif how == "rounded to sixteenths":
        np.rint(x * x.dtype.type(16), out=out)
        out /= x.dtype.type(16)
    elif how == "last position scaled":
        out[-1] *= x.dtype.type(1.02)
    elif how == "last tile from the position before":
        out[1:, ..., -_TILE:] = x[:-1, ..., -_TILE:]
    elif how == "every eighth element halved":
        out[..., ::8] *= x.dtype.type(0.5)
    else:
        largest, smallest = (find(np.abs(x), axis=-1)[..., None] for find in (np.argmax, np.argmin))
        np.put_along_axis(out, largest, np.take_along_axis(x, smallest, -1), -1)
        np.put_along_axis(out, smallest, np.take_along_axis(x, largest, -1), -1)
    return out
