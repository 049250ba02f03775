"""What depends on what: which errors are origins, which are inherited, and where to look next.

The value at (point p, position t) depends on every earlier point at positions ≤ t, except on branches of the same layer
that have not met p's yet (queries, keys and values; gate and up).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import EMBD, LOGITS, OUTPUT_NORM, in_layer, independent, parse

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Upstream:
    """Of everything that a record depends on, [R]: the worst NMSE, and whether any of it failed."""

    worst: Floats
    failed: NDArray[np.bool_]


def upstream(
    points: Sequence[str], point: Ints, seq: Ints, token_idx: Ints, nmse: Floats, failed: NDArray[np.bool_]
) -> Upstream:
    """The errors above each record.

    Args:
        points: names in dataflow order.
        point: int64 [R], index into `points`, ascending.
        seq, token_idx: int64 [R].
        nmse: float64 [R], `failed`: bool [R].
    """
    worst, spoiled = np.zeros(len(point)), np.zeros(len(point), dtype=np.bool_)
    starts = np.searchsorted(point, np.arange(len(points) + 1))
    for sequence in sorted(set(seq.tolist())):  # np.unique would import numpy.ma, 20 ms
        places, place = np.unique(token_idx, return_inverse=True)
        # Running maxima over positions: of all layers before, and of each point of the present layer.
        before = _Front(np.zeros(len(places)), np.zeros(len(places), dtype=np.bool_))
        layer: list[tuple[str, _Front]] = []
        section: int | None = None
        for number, name in enumerate(points):
            rows = np.arange(starts[number], starts[number + 1])
            rows = rows[seq[rows] == sequence]
            if not len(rows):
                continue
            here = parse(name).layer
            if here != section or here is None:
                before, layer, section = _join([before, *(front for _, front in layer)]), [], here
            above = _join([before, *(front for other, front in layer if not independent(other, name))])
            at = place[rows]
            worst[rows], spoiled[rows] = above.worst[at], above.failed[at]
            layer.append((name, _Front.of(at, nmse[rows], failed[rows], len(places))))
    return Upstream(worst, spoiled)


@dataclass(frozen=True)
class _Front:
    """Per position: the worst error at it or before it, and whether anything failed there."""

    worst: Floats
    failed: NDArray[np.bool_]

    @staticmethod
    def of(at: Ints, nmse: Floats, failed: NDArray[np.bool_], length: int) -> "_Front":
        worst, spoiled = np.zeros(length), np.zeros(length, dtype=np.bool_)
        worst[at], spoiled[at] = np.nan_to_num(nmse, nan=0.0, posinf=np.inf), failed
        return _Front(np.maximum.accumulate(worst), np.logical_or.accumulate(spoiled))


def _join(fronts: list[_Front]) -> _Front:
    if len(fronts) == 1:
        return fronts[0]
    return _Front(
        np.maximum.reduce([front.worst for front in fronts]), np.logical_or.reduce([front.failed for front in fronts])
    )


# What each operation reads. A choice in brackets: the first that was recorded stands for all; "-" is the layer before.
_READS: dict[str, tuple[tuple[str, ...], ...]] = {
    "attn_norm": (("-",),),
    "q": (("attn_norm",),),
    "k": (("attn_norm",),),
    "v": (("attn_norm",),),
    "q_norm": (("q",),),
    "k_norm": (("k",),),
    "q_rope": (("q_norm", "q"),),
    "k_rope": (("k_norm", "k"),),
    "k_read": (("k_rope",),),
    "v_read": (("v",),),
    "kq": (("q_rope",), ("k_read", "k_rope")),
    "kq_soft_max": (("kq",),),
    "kqv_out": (("kq_soft_max",), ("v_read", "v")),
    "attn_out": (("kqv_out",),),
    "ffn_inp": (("attn_out",), ("-",)),
    "ffn_norm": (("ffn_inp",),),
    "ffn_gate": (("ffn_norm",),),
    "ffn_up": (("ffn_norm",),),
    "ffn_swiglu": (("ffn_gate",), ("ffn_up",)),
    "ffn_out": (("ffn_swiglu",),),
    "l_out": (("ffn_out",), ("ffn_inp",)),
}
_WIDE = 16  # layers of which everything is recorded in one further run; of more than these, the outputs come first


def reads(name: str, recorded: Collection[str], n_layers: int | None = None) -> list[str] | None:
    """The points that the operation making `name` reads, recorded or not; None for a node outside the vocabulary.

    Optional points (query and key norms, rows read from the cache) stand in only where they were recorded. Without the
    number of layers the last recorded layer is taken for the last.
    """
    point = parse(name)
    if name == EMBD:
        return []
    if name == LOGITS:
        return [OUTPUT_NORM]
    if name == OUTPUT_NORM:
        layers = [found for found in (parse(other).layer for other in recorded) if found is not None]
        count = n_layers or (max(layers) + 1 if layers else 0)
        return [in_layer(count - 1, "l_out")] if count else None
    if point.layer is None or point.kind not in _READS:
        return None
    made: list[str] = []
    for choice in _READS[point.kind]:
        names = [_named(point.layer, kind) for kind in choice]
        made.append(next((found for found in names if found in recorded), names[-1]))
    return made


def _named(layer: int, kind: str) -> str:
    if kind != "-":
        return in_layer(layer, kind)
    return in_layer(layer - 1, "l_out") if layer else EMBD


@dataclass(frozen=True)
class Suspects:
    """What lies between what agrees and what does not.

    `inputs` are the recorded points that the unrecorded stretch begins with, `unrecorded` what lies between; with none of
    those the operation itself is named. None of it is known (`inputs` empty) for a node outside the vocabulary.
    """

    inputs: tuple[str, ...]
    unrecorded: tuple[str, ...]


def suspects(name: str, recorded: Collection[str], n_layers: int | None = None) -> Suspects | None:
    """Walk back from `name` until recorded points; None where the vocabulary doesn't know how it is made."""
    waiting, inputs, between = [name], list[str](), list[str]()
    seen: set[str] = set()
    while waiting:
        made = reads(waiting.pop(), recorded, n_layers)
        if made is None:
            return None
        for other in (other for other in made if other not in seen):
            seen.add(other)
            if other in recorded:
                inputs.append(other)
            else:
                between.append(other)
                waiting.append(other)
    return Suspects(tuple(inputs), tuple(between))


def next_points(name: str, last: str | None, found: Suspects | None) -> str:
    """A `--points` value for one more run that names the operation; empty if the records name it already.

    `last` is the last point that agrees.
    """
    if found is not None and not found.unrecorded:
        return ""
    here = parse(name).layer
    if found is None:
        before = parse(last).layer if last else None
        low = before if before is not None else 0
        high = here if here is not None else low
        return _layers(low, max(low, high)) if here is not None or before is not None else "all"
    layers = sorted({layer for layer in (parse(other).layer for other in found.unrecorded) if layer is not None})
    outside = [other for other in (*found.inputs, *found.unrecorded, name) if parse(other).layer not in layers]
    if not layers:
        return ",".join(sorted(set(outside), key=outside.index))
    if len(layers) > _WIDE:
        return ",".join([*dict.fromkeys(outside), f"blk.{{{layers[0]}..{layers[-1]}}}.{{kqv_out,ffn_inp,l_out}}"])
    return ",".join([*dict.fromkeys(outside), _layers(layers[0], layers[-1])])


def _layers(low: int, high: int) -> str:
    return f"blk.{low}.*" if low == high else f"blk.{{{low}..{high}}}.*"
