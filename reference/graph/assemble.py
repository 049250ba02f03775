"""A recorded graph, assembled from its flattened passes: kinds of leaves, rules of inputs, sizes, points."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.graph import CACHE, INPUT, NODE, STATE, VIEWS, WEIGHT, Graph, InputRule, MovingParam, Size, Tensor
from checkpoints.rules import UNDEFINED, Recorded, explain

from ..ggml import Ggml
from .points import points_of
from .raw import INPUT_FLAG, FlatPass, RawPass, RawTensor, unrecordable

_Known = Sequence[tuple[str, InputRule]]  # rules of inputs by name, which a single token may not tell apart


def assemble(
    flats: Sequence[FlatPass],
    sizes: NDArray[np.int64],
    passes: Sequence[RawPass],
    ggml: Ggml,
    weights: frozenset[str],
    facts: dict[str, Any],
    several: Graph | None = None,
    prefix: str = "",
) -> Graph:
    """The graph of passes that have the same structure.

    Args:
        sizes: of every tensor, as expressions of T, S and E: int64 [tensors, 9, 7].
        several: if these are passes over one token, the graph of a pass over more: it shows what has a row for each position.
        prefix: put in front of the points.

    Raises:
        ReferenceFailed: parameters depend on the length, but are no expression of it.
    """
    flat = flats[0]
    names = points_of(flat, ggml, prefix)
    kept = kept_leaves(flat, ggml)
    plain = sizes.tolist()
    # Only a pass over several positions shows what has a row for each.
    rows = frozenset() if several is None else {tensor.point for tensor in several.tensors}
    known = () if several is None else [(tensor.name, tensor.rule) for tensor in several.tensors if tensor.rule is not None]
    tensors = []
    for i, raw in enumerate(flat.tensors):
        op = ggml.op_name(raw.op)
        kind = NODE if i >= flat.leaves else _kind(i, raw, weights, kept)
        expressions = [Size(*row) for row in plain[i]]
        ne = (expressions[0], expressions[1], expressions[2], expressions[3])
        point = names.points.get(i, "")
        params = raw.params if kind == NODE and op not in VIEWS else (0,) * 16
        moving = _moving(i, flats, passes) if kind == NODE and op not in VIEWS else ()
        tensors.append(
            Tensor(
                name=raw.name,
                kind=kind,
                op=op,
                params=params,
                type=ggml.type_name(raw.type),
                ne=ne,
                nb=(expressions[4], expressions[5], expressions[6], expressions[7]),
                sources=flat.sources[i],
                root=flat.roots[i],
                offset=expressions[8],
                point=point if i in names.once or (point in rows if several is not None else Size(0, 1) in ne) else "",
                operand_points=names.operands.get(i, {}),
                parts=tuple(names.parts.get(i, ())),
                rule=_rule(i, raw, flats, passes, facts, known) if kind == INPUT else None,
                moving=moving,
            )
        )
    return Graph(tuple(tensors))


def _moving(index: int, flats: Sequence[FlatPass], passes: Sequence[RawPass]) -> tuple[MovingParam, ...]:
    """The parameters of a node that differ from pass to pass, as expressions of T and S.

    Raises:
        ReferenceFailed: they are no such expression.
    """
    raw = flats[0].tensors[index]
    params = np.array([flat.tensors[index].params for flat in flats], dtype=np.int32)
    if not (differing := np.flatnonzero((params != params[0]).any(axis=0))).size:
        return ()
    lengths = [(len(taken.now.tokens), taken.cached) for taken in passes]
    found = []
    for number in differing.tolist():
        as_float = params[:, number].view(np.float32)
        for values, real in ((params[:, number], False), (as_float, True)):
            if (size := _expression(values, lengths)) is not None:
                found.append(MovingParam(number, size, real))
                break
        else:
            raise unrecordable(raw, "has parameters that depend on the length")
    return tuple(found)


def _expression(values: NDArray[Any], lengths: Sequence[tuple[int, int]]) -> Size | None:
    """Whole numbers of passes over T tokens and S cached positions as fixed + tokens · T + cached · S; None if they are not that."""
    if not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        return None
    terms = np.array([[1, t, s] for t, s in lengths], dtype=np.float64)
    solved = np.rint(np.linalg.lstsq(terms, values.astype(np.float64), rcond=None)[0])
    return Size(*(int(number) for number in solved)) if (terms @ solved == values).all() else None


def kept_leaves(flat: FlatPass, ggml: Ggml) -> dict[int, str]:
    """The kinds of the leaves that are kept from pass to pass, by index: in a cache rows are set, a state is copied as a whole."""
    kinds = {"SET_ROWS": CACHE, "CPY": STATE}
    written = [(root, ggml.op_name(raw.op)) for raw, root in zip(flat.tensors, flat.roots, strict=True) if root is not None]
    return {root: kinds[op] for root, op in written if op in kinds}


def _kind(index: int, raw: RawTensor, weights: frozenset[str], kept: dict[int, str]) -> str:
    if raw.flags & INPUT_FLAG:
        return INPUT
    if index in kept or raw.name.startswith("cache_"):
        return kept.get(index, CACHE)
    return WEIGHT if raw.name in weights else INPUT


def _rule(
    index: int, raw: RawTensor, flats: Sequence[FlatPass], passes: Sequence[RawPass], facts: dict[str, Any], known: _Known
) -> InputRule | None:
    if not raw.flags & INPUT_FLAG:  # memory that nothing has been written to
        return InputRule(UNDEFINED)
    recorded = [
        Recorded(taken.now, flat.tensors[index].ne, taken.data[flat.tensors[index].address])
        for flat, taken in zip(flats, passes, strict=True)
    ]
    return explain(recorded, facts, [rule for name, rule in known if name == raw.name])
