"""Attention's weights: which keys have another weight than they should, the same for all wrong heads and positions."""

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from .beside import ENOUGH, LEFT_OF_MANY, Beside, Bools, Floats, Ints
from .moved import LISTED

# How far the sum of a right soft max may be from 1: float32 rounds each weight in proportion to itself, together by some 1e-7,
# and engines' exp differ by a few times that; ten times that in round numbers. With a sink it is far less than 1, and no law is told.
_ONE = 1e-5
_TOLD_APART = 3  # keys from which on the first, the own and the others are different things
_Change = Callable[[Floats, Bools], Floats]  # right weights [H, t + 1] and True at one key of each head: the wrong ones


def _all_there(_right: Floats, at: Bools) -> Floats:
    return at.astype(np.float64)


def _none_there(right: Floats, at: Bools) -> Floats:
    return np.where(at, 0.0, right)


def _others_instead(right: Floats, at: Bools) -> Floats:
    rest = _none_there(right, at)
    total = rest.sum(axis=-1, keepdims=True)
    return np.asarray(rest / np.where(total > 0, total, 1.0))


def _even(right: Floats, _at: Bools) -> Floats:
    return np.full_like(right, 1 / right.shape[-1])


def _first(right: Floats) -> Bools:
    return np.broadcast_to(np.arange(right.shape[-1]) == 0, right.shape)


def _own(right: Floats) -> Bools:
    return np.broadcast_to(np.arange(right.shape[-1]) == right.shape[-1] - 1, right.shape)


def _largest(right: Floats) -> Bools:
    return np.asarray(np.arange(right.shape[-1]) == right.argmax(axis=-1)[..., None])


_LAWS: tuple[tuple[str, Callable[[Floats], Bools], _Change], ...] = (
    ("the first key has the whole weight", _first, _all_there),
    ("the position's own key has the whole weight", _own, _all_there),
    ("the key of the largest weight has the whole weight", _largest, _all_there),
    ("all keys have the same weight", _first, _even),
    ("the first key has no weight, and the others share it", _first, _others_instead),
    ("the first key has no weight; the others have the right ones", _first, _none_there),
    ("the position's own key has no weight, and the earlier ones share it", _own, _others_instead),
    ("the position's own key has no weight; the earlier ones have the right ones", _own, _none_there),
)


def law_of_keys(compared: Beside, sizes: Ints, counts: Ints, of_all: Ints) -> str:
    """The sentence of the law of attention's weights that holds in all heads that are wrong; "" if none does.

    Several that these numbers cannot tell apart are said together.

    Args:
        compared: rows of heads side by side, each with a weight for every key up to the row's position; what a row lacks may be anything.
        sizes, counts: how many elements a row has, and how many of them were recorded, [R]. of_all: the sizes of all rows of the point,
            which say how many heads there are.
    """
    heads = int(np.gcd.reduce(of_all))
    keys = sizes // max(heads, 1)
    recorded = int(min(np.minimum(counts, sizes) // np.maximum(keys, 1), default=0))
    if not recorded or keys.max() < _TOLD_APART:
        return ""
    right, dumped = (
        [row[: recorded * count].reshape(recorded, count) for row, count in zip(side, keys, strict=True)]
        for side in (compared.right, compared.dumped)
    )
    if not all(np.isfinite(row).all() for row in dumped) or any(map(_is_no_soft_max, right)):
        return ""
    seen = replace(compared, dumped=_side_by_side(dumped), right=_side_by_side(right))
    wrong = _wrong_heads(seen, right, dumped)
    if wrong.sum() * keys.sum() < ENOUGH:
        return ""
    held = [
        sentence
        for sentence, where, change in _LAWS
        if seen.holds(
            _side_by_side([np.where(wrong[:, None], change(row, where(row)), row) for row in right]), share=LEFT_OF_MANY
        )
    ]
    if not held:
        return ""
    of = "every head" if recorded == heads else f"every recorded head ({recorded} of {heads})"
    if not wrong.all():
        numbers = np.flatnonzero(wrong).tolist()
        of = f"head{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:LISTED]))}{', …' * (len(numbers) > LISTED)} alone"
    return f"in {of} {', or '.join(held)}{' (these numbers fit each)' if len(held) > 1 else ''}"


def _is_no_soft_max(right: Floats) -> bool:
    return bool((np.abs(right.sum(axis=1) - 1) > _ONE).any() or (right < 0).any())


def _wrong_heads(compared: Beside, right: list[Floats], dumped: list[Floats]) -> Bools:
    """Which heads are wrong in any of the rows, [H]: by more than the whole row may be."""
    errors = np.array([((here - there) ** 2).sum(axis=1) for here, there in zip(dumped, right, strict=True)])
    return np.asarray((errors > compared.room[:, None]).any(axis=0))


def _side_by_side(rows: list[Floats]) -> Floats:
    """Rows of several lengths, [H, t + 1] each, as one array, with 0 after the shorter ones."""
    joined = np.zeros((len(rows), max(row.size for row in rows)))
    for number, row in enumerate(rows):
        joined[number, : row.size] = row.ravel()
    return joined
