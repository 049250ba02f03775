"""The list of points that were recorded otherwise, with the lines of a `--map` file that settle it."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from checkpoints.answers.diff import RecordFault
from checkpoints.points import parse
from checkpoints.printable import listed
from checkpoints.record import Rows

from ..measured.dataflow import Flow, ordered
from .readings import Reading


def record_fault(wrong: Rows, read: Reading | None, agreeing: Sequence[str], *, nonfinite: bool) -> RecordFault:
    """The fault of a point's wrong records.

    Args:
        wrong: those records, ours.
        read: what they show, if that is known.
        agreeing: the nearest points made from it that agree.
        nonfinite: whether they have NaN or infinity where the reference has not.
    """
    what = read.sentence if read is not None else "another layout, moment or point than its name says"
    if nonfinite:
        nan = np.isnan(wrong.values).any()
        what = f"{'NaN' if nan else 'infinity'} that no later operation used: memory captured before it was written, or after it was reused"
        what += "" if nan else ", or an overflow of the capture's own type"
    if agreeing:
        what += f"; {listed(agreeing[:3])}, computed from it, {'agrees' if len(agreeing) == 1 else 'agree'}"
    return RecordFault(
        checkpoint=wrong.point,
        layer=parse(wrong.point).layer,
        kind="nonfinite" if nonfinite else (read.kind if read is not None else "unknown"),
        positions=tuple(sorted(set(wrong.token_idx.tolist()))),
        records=len(wrong),
        sentence=what,
        map=read.mapping if read is not None else "",
    )


def in_order(faults: Sequence[RecordFault], compared: Sequence[str], model: Flow) -> tuple[RecordFault, ...]:
    """The faults in the order of computation.

    Where every recorded layer of a kind of point has the same `--map` line, that becomes one line, with `{i}` for the layer.
    """
    faulty = [fault.checkpoint for fault in faults]
    place = {name: number for number, name in enumerate(ordered(faulty, model.whole))}
    names = {*compared, *faulty}
    recorded: dict[str, int] = Counter(point.kind for point in map(parse, names) if point.layer is not None)
    lines: dict[str, list[str]] = {}
    for fault in faults:
        lines.setdefault(parse(fault.checkpoint).kind, []).append(_for_any_layer(fault))
    return tuple(
        replace(fault, map=_for_any_layer(fault)) if _one_line(lines[kind], recorded.get(kind, 0)) else fault
        for fault in sorted(faults, key=lambda fault: place[fault.checkpoint])
        for kind in (parse(fault.checkpoint).kind,)
    )


def _one_line(lines: Sequence[str], layers: int) -> bool:
    return len(lines) == layers and len(lines) > 1 and len(set(lines)) == 1


def _for_any_layer(fault: RecordFault) -> str:
    return fault.map.replace(f"blk.{fault.layer}.", "blk.{i}.") if fault.layer is not None else fault.map
