"""Captures that are not part of the CUDA graph that an engine replays: the same values in every decode step."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import of_scores, parse

from .rule import Hit, Subject, telling

_LEAST = 3  # equal decode steps, and equal layers, from which on it is reported


def graph_replay(subject: Subject) -> Iterator[Hit]:
    """Decode steps have the same values at every point, or layers have one output in every decode step but not in the prefill."""
    decoded = {name: rows.decode & (rows.seq == 0) & telling(rows) for name, rows in subject.points.items() if _judged(name)}
    decoded = {name: members for name, members in decoded.items() if members.sum() >= _LEAST}
    if len(decoded) < 2:
        return
    first = next(iter(decoded))
    positions = sorted({int(t) for t in subject.points[first].token_idx[decoded[first]]})
    if all(subject.same_input(a, b) is True for a, b in pairwise(positions)):
        return  # one repeated token: embeddings, and what is made from them alone, are rightly the same
    if all(_alike(subject.points[name].values[members]) for name, members in decoded.items()):
        steps = f"all {len(positions)} decode steps from position {positions[0]} on"
        yield Hit(first, positions[0], f"{steps} hold the same values at all {len(decoded)} points")
        return
    layers = [name for name in decoded if parse(name).kind == "l_out"]
    if len(layers) < _LEAST or not _same_layers(subject, layers, decode=True) or _same_layers(subject, layers, decode=False):
        return
    yield Hit(layers[0], positions[0], f"{len(layers)} layers have one output in every decode step, and not in the prefill")


def _judged(name: str) -> bool:
    """Whether a point is judged; scores grow with the positions, and saturated weights may be equal in any two steps."""
    return not of_scores(name) and parse(name).kind not in ("k_read", "v_read")


def _alike(values: NDArray[np.float32]) -> bool:
    bits = values.view(np.uint32)
    return bool((bits == bits[0]).all())


def _same_layers(subject: Subject, layers: list[str], *, decode: bool) -> bool:
    """Whether the layers' outputs are the same at each position of this phase."""
    rows = [subject.points[name] for name in layers]
    members = [(each.decode == decode) & (each.seq == 0) for each in rows]
    if len({tuple(each.token_idx[chosen].tolist()) for each, chosen in zip(rows, members, strict=True)}) > 1:
        return False
    values = [np.ascontiguousarray(each.values[chosen]).view(np.uint32) for each, chosen in zip(rows, members, strict=True)]
    return all(other.shape == values[0].shape and bool((other == values[0]).all()) for other in values)
