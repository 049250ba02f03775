"""A value in ggml's dimensions: which of them counts the positions, and the value rearranged to one row per position."""

from collections.abc import Sequence
from math import prod

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints import points

from .jobs import Node, Outline
from .naming import Planned, Signer, plan
from .session import Session


class Survey(Struct, frozen=True):
    """What a pass computes.

    Attributes:
        nodes: every node of the graph, in the order of computation.
        planned: every value that has a name; `known` are those that consist of rows of positions, or are a state after the pass.
        causal: whether no position sees a later one, by the masks of this pass.
    """

    nodes: tuple[Node, ...]
    planned: tuple[Planned, ...]
    known: tuple[Planned, ...]
    causal: bool


def survey(
    session: Session, inputs: Sequence[int] | NDArray[np.float32], *, offset: int = 0, prefix: str = "", encode: bool = False
) -> Survey:
    """List the graph of a pass, and of a second one of another length, to see which dimension of a value counts the positions."""
    nodes = session.list_nodes(inputs, encode=encode)
    # A decoder's mask over an encoder's rows hides none of them.
    causal = session.tap.causal or (session.model.encoder_decoder and not encode)
    planned = plan(nodes, offset=offset, prefix=prefix)
    count = len(inputs)
    others = inputs[:-1] if count > 2 else _longer(inputs)
    sizes = _sizes(session.outline_nodes(others, encode=encode))
    known = []
    for item in planned:
        axis = _axis(item.node.ne, sizes.get(item.signature), count, len(others))
        if item.operand is not None or item.once or axis is not None or (count == 1 and item.signature not in sizes):
            known.append(replace(item, axis=axis))
    readable = session.model.library.ggml.readable
    kept = tuple(item for item in known if readable(_taken(item).type))
    return Survey(tuple(nodes), tuple(planned), kept, causal)


def _longer(inputs: Sequence[int] | NDArray[np.float32]) -> Sequence[int] | NDArray[np.float32]:
    return np.concatenate([inputs, inputs[:1]]) if isinstance(inputs, np.ndarray) else (*inputs, inputs[0])


def _sizes(nodes: Sequence[Outline]) -> dict[tuple[str, str, str, int], tuple[int, ...]]:
    signer = Signer()
    return {signer.sign(node.name, node.op, node.first): node.ne for node in nodes}


def _axis(ne: tuple[int, ...], other: tuple[int, ...] | None, count: int, length: int) -> int | None:
    """The dimension with one element per position; of two such (keys and queries, if nothing is cached), the queries'."""
    if other is None:
        return None
    axes = [axis for axis, pair in enumerate(zip(ne, other, strict=True)) if pair == (count, length)]
    return max(axes) if axes and max(axes) <= 1 else (axes[0] if axes else None)


def _taken(planned: Planned) -> Node:
    """The tensor that is read, as a node: the planned node or its operand."""
    if planned.operand is None:
        return planned.node
    source = planned.node.sources[planned.operand]
    return replace(planned.node, ne=source.ne, type=source.type)


def row_shape(planned: Planned, count: int) -> tuple[str, ...]:
    """The shape of one position's row: numbers as text, "t+1" for the positions seen so far."""
    ne = _taken(planned).ne
    if planned.operand is not None:
        return ("t+1", str((ne[0] if planned.point.endswith("k_read") else ne[1]) * ne[2]))
    if points.of_scores(planned.point):
        return (str(ne[2]), "t+1")
    if planned.part is not None:
        ne = (planned.part[1] - planned.part[0], *ne[1:])
    return (str(prod(ne) // (1 if planned.once else count)),)


def arrange(planned: Planned, value: NDArray[np.float32], count: int, seen: int) -> NDArray[np.float32]:
    """A value in the form that `checkpoints.summary.summarise` takes.

    Args:
        planned: what the value is.
        value: the value as it was read, in four dimensions.
        count: positions of this forward pass, T.
        seen: cached positions after it, S; the cache's padding is cut off.

    Returns:
        [T, …]; [1, n] for a value that a pass has once; [H, T, S] for `kq` and `kq_soft_max`; [S, K·d] for `k_read` and `v_read`.
    """
    if planned.operand is not None:
        rows = value[0].transpose(1, 0, 2) if planned.point.endswith("k_read") else value[0].transpose(2, 0, 1)
        return np.ascontiguousarray(rows[:seen]).reshape(min(seen, len(rows)), -1)
    if planned.part is not None:
        value = value[..., planned.part[0] : planned.part[1]]
    if planned.once or (planned.axis is None and count == 1):
        return np.ascontiguousarray(value).reshape(1, -1)
    if points.of_scores(planned.point):
        return np.ascontiguousarray(value.reshape(-1, *value.shape[2:])[:, :, :seen])
    rows = np.moveaxis(value, 3 - planned.axis, 0) if planned.axis is not None else value.reshape(count, -1)
    shape = [size for i, size in enumerate(rows.shape[1:]) if size != 1 or any(n != 1 for n in rows.shape[1 : i + 1])]
    return np.ascontiguousarray(rows).reshape(count, *(shape or [1]))
