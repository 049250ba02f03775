"""What to record next: a `--points` value for one more run that names the operation."""

from collections.abc import Collection, Sequence

from checkpoints.points import parse

from ..measured.dataflow import Stretch

_WIDE = 16  # layers that are recorded completely in one further run; if there are more, their outputs come first
_FEW = 8  # points of one layer that are named one by one


def next_points(name: str, last: str | None, stretch: Stretch | None, compared: Collection[str]) -> str:
    """A `--points` value that closes the gap before `name`; empty if there is none.

    Args:
        last: the last point that agrees.
        compared: the points recorded on both sides. A layer that was partly recorded is not asked for as a whole again.
    """
    if stretch is not None and not stretch.unrecorded:
        return ""
    here = parse(name).layer
    if stretch is None:
        before = parse(last).layer if last else None
        low = before if before is not None else 0
        high = here if here is not None else low
        return _glob(low, max(low, high)) if here is not None or before is not None else "all"
    layers = sorted({layer for layer in (parse(other).layer for other in stretch.unrecorded) if layer is not None})
    every = [*stretch.inputs, *stretch.unrecorded, name]
    begun = {point.layer for point in map(parse, compared) if point.layer is not None and point.kind != "l_out"}
    if layers and (set(layers) <= begun or len(stretch.unrecorded) <= _FEW):
        return points_value(every)
    outside = [other for other in every if parse(other).layer not in layers]
    if not layers:
        return ",".join(sorted(set(outside), key=outside.index))
    if len(layers) > _WIDE:
        return ",".join([*dict.fromkeys(outside), f"blk.{{{layers[0]}..{layers[-1]}}}.{{kqv_out,ffn_inp,l_out}}"])
    return ",".join([*dict.fromkeys(outside), _glob(layers[0], layers[-1])])


def points_value(names: Sequence[str]) -> str:
    """These points as a `--points` value, those of one layer in braces."""
    kinds: dict[int | None, list[str]] = {}
    for name in dict.fromkeys(names):
        point = parse(name)
        kinds.setdefault(point.layer, []).append(point.kind)
    outside = kinds.pop(None, [])
    inside = [f"blk.{layer}.{some[0] if len(some) == 1 else '{' + ','.join(some) + '}'}" for layer, some in kinds.items()]
    return ",".join([*outside, *inside])


def _glob(low: int, high: int) -> str:
    return f"blk.{low}.*" if low == high else f"blk.{{{low}..{high}}}.*"
