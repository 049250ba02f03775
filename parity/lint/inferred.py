"""What a point's values depend on, judged by the records alone, if neither a header nor a model file says how it is made."""

from collections import defaultdict
from collections.abc import Hashable

import numpy as np

from checkpoints.points import EMBD, parse
from checkpoints.record import Rows

from .rule import TELLING, Subject, leading

_PASS_ROUNDING = 1e-5  # of a row's largest value: a token's values in two passes, whose sums have another order
_OF_ATTENTION = frozenset({"kqv_out", "attn_out"})
_PROGRESSION = 4  # positions, from which on even steps are no coincidence
_FACTOR_ROUNDING = 1e-6  # of a row's largest value: a row times one number, in float32


def follows_tokens(subject: Subject, rows: Rows) -> bool:
    """Whether, where nothing says how a point is made, its rows are the same at equal tokens, not only neighbouring ones, and nowhere else.

    What a stale buffer holds depends on when it was read, not on the token. From one pass to another, rounding may differ. Never of
    attention's result: where that follows each position's token alone, attention sees no other.
    """
    positions = rows.token_idx.tolist()
    token_at = subject.inputs(positions)
    if (
        subject.dataflow is not None
        or parse(rows.point).kind in _OF_ATTENTION
        or not token_at
        or rows.seq.any()
        or len(set(positions)) < len(positions)
    ):
        return False
    numbers: dict[Hashable, list[int]] = defaultdict(list)
    for number, position in enumerate(positions):
        numbers[token_at[position]].append(number)
    apart = any(np.ptp(rows.token_idx[members]) >= len(members) for members in numbers.values())
    alike = all(_alike(rows, members) for members in numbers.values())
    seen = [{leading(rows, number).tobytes() for number in members} for members in numbers.values()]
    return bool(apart and alike and len(set[bytes]().union(*seen)) == sum(map(len, seen)))


def _alike(rows: Rows, members: list[int]) -> bool:
    """Whether these records are the same but for rounding."""
    first, others = rows.values[members[0]], rows.values[members]
    room = _PASS_ROUNDING * np.abs(first[: int(rows.counts[members[0]])]).max(initial=0.0)
    return bool((rows.counts[members] == rows.counts[members[0]]).all() and (np.abs(others - first) <= room).all())


def follows_positions(subject: Subject, rows: Rows) -> bool:
    """Whether, where nothing says how a point outside the vocabulary is made, all its values rise or fall by one factor, or in one step,
    from each position of the first pass to the next, as a decay by distance does: each pass begins with the same.
    """
    if subject.dataflow is not None or parse(rows.point).known is not None or not len(rows):
        return False
    first = np.flatnonzero((rows.seq == 0) & (rows.step == rows.step.min(initial=0)))
    order = first[np.argsort(rows.token_idx[first])]
    values = rows.values[order].astype(np.float64)
    if len(order) < _PROGRESSION or not np.isfinite(values).all() or (rows.counts[order] != rows.counts[order[0]]).any():
        return False
    values = values[:, : int(rows.counts[order[0]])]
    largest = float(np.abs(values).max(initial=0.0))
    for each, size in ((values, largest), (np.log(values) if (values > 0).all() else None, 1.0)):
        steps = None if each is None else np.diff(each, axis=0)
        if (
            steps is not None
            and steps.size
            and (steps != 0).all()
            and (np.abs(steps - steps[0]) <= _PASS_ROUNDING * size).all()
        ):
            return True
    return False


def scales_the_embedding(subject: Subject, name: str) -> bool:
    """Whether every record is the embedding's leading values times one number, as their norm is: any layer may compute that again."""
    rows, embd = subject.points[name], subject.points.get(EMBD)
    if embd is None or embd.indices is not None or rows.indices is not None or not len(rows):
        return False
    number_at = {int(position): r for r, position in enumerate(embd.token_idx) if embd.seq[r] == 0}
    if rows.seq.any() or not number_at.keys() >= set(rows.token_idx.tolist()):
        return False
    members = [number_at[position] for position in rows.token_idx.tolist()]
    width = min(rows.values.shape[1], embd.values.shape[1])
    if width < TELLING or not np.array_equal(rows.counts, embd.counts[members]):
        return False
    values, inputs = (each[:, :width].astype(np.float64) for each in (rows.values, embd.values[members]))
    along = np.einsum("ij,ij->i", values, inputs)[:, None] / np.maximum(np.einsum("ij,ij->i", inputs, inputs), 1e-30)[:, None]
    return bool((np.abs(values - along * inputs).max(axis=1) <= _FACTOR_ROUNDING * np.abs(values).max(axis=1)).all())
