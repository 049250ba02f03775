"""Errors of the size of lower arithmetic that follow one element, one head or one part of a value: rounding changes all of them.

To first order such an error moves the recorded elements along one column of their derivatives. Those of a sequence's first row are
exact, as it depends on no other.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import parse
from engine import ops
from engine.graph import TOKENS, Step, sees_later, weight_of_step
from engine.replay.adjoint import derivatives
from engine.replay.batched import elementwise

from ..case import Case
from ..records.records import Expected, Floats

_ELEMENTS = 64  # recorded elements whose derivatives are taken, at most
# The share of the error's energy along one direction: a part in 1,000 of an element leaves one in a million beyond first order. Noise of
# that many values of equal weight exceeds it once in 10^8 draws, and there are some thousand elements.
_ALONG, _WEIGHT = 0.9999, 5.0
# The most that an element may have of what all of them, rounded alike, do to the recorded ones: an activation that is a thousand times
# larger than the others, as trained models have at their first token, has all of the rounding's error, too.
_OF_ALL = 0.1
# As many elements of equal weight a part of a row must have at least: rounding moves each of them by another share, and three by the same
# to one in a hundred, as `_ALONG` asks, in one of 10^4 draws; the smaller ones beside them must follow as well.
_MANY = 3.0
_ZERO = 0.02  # a change by minus one, to first order


def one_element(case: Case, entry: Expected, errors: Floats, known: NDArray[np.bool_]) -> str:
    """Which element, head or part the errors of a point's first row follow, as words; empty if none, or if that cannot be said.

    Args:
        errors: [R, k], the recorded elements minus the right ones, where they are known: bool [R, k].
    """
    steps = case.transformer.steps
    first = np.flatnonzero(entry.rows == 0)
    if not len(first) or sees_later(steps) or entry.values.shape[1] < _WEIGHT:
        return ""
    record = int(first[0])
    columns = np.flatnonzero(known[record] & entry.present[record])
    columns = columns[np.unique(np.linspace(0, len(columns) - 1, min(len(columns), _ELEMENTS)).astype(np.int64))]
    wanted = errors[record, columns]
    size = float(wanted @ wanted)
    if not (np.isfinite(size) and size > 0) or size**2 / float((wanted**4).sum()) < _WEIGHT:
        return ""
    elements = columns if entry.index is None else entry.index[record, columns]
    end = next(number for number, step in enumerate(steps) if step.makes == entry.point)
    replay = case.make(steps[: end + 1], 1)
    after_tokens = [step for step in steps[: end + 1] if TOKENS not in step.names]
    if any(elementwise(step) for step in after_tokens):
        return ""  # what the rounding of right engines looks like there was not measured
    try:
        answers = derivatives(after_tokens, entry.point, elements, 0, replay.values, replay.weights)
    except KeyError:  # an operation whose derivatives are not known
        return ""
    on_host = case.transformer.backend.to_host
    changes = {
        name: on_host(part).astype(np.float64) for name, part in answers.items() if name != entry.point and part.ndim == 2
    }
    rows = {name: on_host(replay.values[name])[0].astype(np.float64) for name in changes}
    directions = chain(_directions(changes, rows, _heads(steps)), _as_read(case, after_tokens, changes, rows))
    for what, direction, telling in directions:
        energy = np.einsum("kn,kn->n", direction, direction)
        shares = np.where(telling, (wanted @ direction) ** 2 / (np.where(telling, energy, 1.0) * size), 0.0)
        if shares.max() > _ALONG:
            at = int(np.argmax(shares))
            change = float(wanted @ direction[:, at] / energy[at])
            return f"{what.format(at)} were {'0' if abs(change + 1) < _ZERO else 'off'}"
    return ""


def _as_read(
    case: Case, steps: Sequence[Step], changes: Mapping[str, Floats], rows: Mapping[str, Floats]
) -> Iterator[tuple[str, Floats, NDArray[np.bool_]]]:
    """The same of an element that one product alone reads wrong, or a column of its matrix: it moves the whole product."""
    for step in steps:
        if step.op is not ops.linear or step.makes not in changes or not isinstance(step.reads[0], str):
            continue
        read, weight = step.reads[0], step.weights[0]
        if read not in rows or not isinstance(weight, str):
            continue
        matrix = case.transformer.backend.to_host(weight_of_step(weight, case.replay.weights)).astype(np.float64)
        scaled = changes[step.makes] @ matrix * rows[read] if rows[read].shape == matrix.shape[1:] else np.zeros((1, 0))
        energy = np.einsum("kn,kn->n", scaled, scaled)
        if energy.size:
            telling = (energy > 0) & (energy < _OF_ALL * energy.sum())
            yield f"element {{}} of {read}, as {step.makes} reads it,", scaled, telling


def _directions(
    changes: Mapping[str, Floats], rows: Mapping[str, Floats], heads: Collection[int]
) -> Iterator[tuple[str, Floats, NDArray[np.bool_]]]:
    """Where the elements of values, and the heads of attention's, move what is recorded, [k, n] each: of one value, and in all layers.

    With them, which of these directions rounding does not have: bool [n].
    """
    of_kind: dict[str, list[str]] = {}
    for name, part in changes.items():
        if rows[name].shape == part.shape[1:]:
            of_kind.setdefault(parse(name).kind, []).append(name)
    for kind, names in of_kind.items():
        for alike in [
            *([name] for name in names),
            *([names] if len(names) > 1 and len({changes[name].shape for name in names}) == 1 else []),
        ]:
            scaled = sum((changes[name] * rows[name] for name in alike), np.zeros_like(changes[alike[0]]))
            where = alike[0] if len(alike) == 1 else f"blk.*.{kind}"
            energy = np.einsum("kn,kn->n", scaled, scaled)
            small = energy < _OF_ALL * energy.sum()
            yield f"element {{}} of {where}", scaled, small & (energy > 0)
            for (what, parts), (_, sums), (_, squares) in zip(
                _parts(scaled), _parts(energy[None]), _parts(energy[None] ** 2), strict=True
            ):
                telling = np.asarray(sums[0] ** 2 >= _MANY * squares[0]) & (sums[0] > 0)
                yield f"{what} of {where}", parts, telling & ~_as_the_whole(scaled, parts)
            for count in heads if kind[:1] in "qkv" else ():
                if scaled.shape[1] % count == 0:
                    of_heads = scaled.reshape(len(scaled), count, -1).sum(axis=2)
                    yield f"head {{}} of {where}", of_heads, bool(small.all()) & of_heads.any(axis=0)


def _as_the_whole(scaled: Floats, parts: Floats) -> NDArray[np.bool_]:
    """Which parts move the recorded elements as the whole value does, so that no recorded element distinguishes them from it."""
    whole = scaled.sum(axis=1)
    energy = np.einsum("kn,kn->n", parts, parts)
    return np.asarray((whole @ parts) ** 2 > _ALONG * energy * (whole @ whole))


def _parts(scaled: Floats) -> Iterator[tuple[str, Floats]]:
    """Where parts of a row move what is recorded, [k, parts], from where its elements do, [k, n]: its beginnings, ends and quarters."""
    count = scaled.shape[1]
    beginnings = np.cumsum(scaled, axis=1)
    yield "elements 0 to {}", beginnings[:, : count - 1]
    yield "the elements after {}", beginnings[:, -1:] - beginnings[:, : count - 1]
    if count % 4 == 0:
        yield "quarter {}", scaled.reshape(len(scaled), 4, -1).sum(axis=2)


def _heads(steps: Sequence[Step]) -> set[int]:
    """How many heads attention has, for queries and for keys, where there are several."""
    counts = {step.params.get(name) for step in steps for name in ("heads", "kv_heads")}
    return {count for count in counts if isinstance(count, int) and count > 1}
