"""What each point of a graph is made from: paths between planned nodes, through the unplanned ones between them."""

import re
from collections.abc import Sequence

from checkpoints.dataflow import CACHE, Computation, Dataflow
from checkpoints.points import parse

from .jobs import Node, OperandSource
from .naming import VIEWS, Planned
from .passes import Plans

_OF_THE_ENCODER = re.compile(r"cross_attn_[kv]\.")  # weights that are multiplied with an encoder's output
_WRITTEN = {"SET_ROWS": 2, "CPY": 1}  # the number of the operand that is written to; operand 0 is what is written


def dataflow(nodes: Sequence[Node], planned: Sequence[Planned], encoded: str = "") -> Dataflow:
    """The dataflow of a pass.

    Args:
        nodes: all nodes of the graph, in the order of computation.
        planned: the values that `naming.plan` takes from it.
        encoded: the point of an encoder's pass that a decoder's keys and values of cross-attention are made from.
    """
    return _Walk(nodes, planned, encoded).dataflow()


def of_passes(plans: Plans) -> Dataflow:
    """The dataflow of a run over a prompt; for an encoder–decoder, of both halves."""
    if plans.encoder is None:
        return dataflow(plans.prompt.nodes, plans.prompt.planned)
    first = dataflow(plans.encoder.nodes, plans.encoder.planned)
    second = dataflow(plans.prompt.nodes, plans.prompt.planned, list(first.computations)[-1])
    return Dataflow({**first.computations, **second.computations})


class _Walk:
    """From each planned value back to the planned values before it."""

    def __init__(self, nodes: Sequence[Node], planned: Sequence[Planned], encoded: str) -> None:
        self._encoded = encoded
        self._nodes = {node.address: node for node in nodes}
        self._planned = planned
        self._point = {item.node.address: item.point for item in planned if item.operand is None and item.part is None}
        self._views: dict[int, list[str]] = {}  # a node without a name of its own -> the points that are views of it
        for item in planned:
            if item.part is not None:
                self._views.setdefault(item.node.address, []).append(item.point)
            elif item.operand is None and item.node.op in VIEWS and item.node.sources:
                whole = self._memory(item.node.sources[0], stop=True)
                if whole.address in self._point and parse(self._point[whole.address]).known is None:
                    self._views.setdefault(whole.address, []).append(item.point)
        self._written: dict[int, list[OperandSource]] = {}  # memory that nodes write to -> what they write there
        for node in nodes:
            if node.op in _WRITTEN and len(node.sources) > _WRITTEN[node.op]:
                target = self._memory(node.sources[_WRITTEN[node.op]])
                self._written.setdefault(target.address, []).append(node.sources[0])

    def dataflow(self) -> Dataflow:
        """The dataflow, points in the order of computation; a read of a later point is left out."""
        read = {(item.node.address, item.operand): item.point for item in self._planned if item.operand is not None}
        origins: dict[str, Computation] = {}
        for item in self._planned:
            node = item.node
            if item.part is not None and node.address in self._point:
                origins[item.point] = Computation(
                    "VIEW", (self._point[node.address],) if self._point[node.address] in origins else ()
                )
                continue
            sources = node.sources if item.operand is None else (node.sources[item.operand],)
            points: list[str] = []
            weights: list[str] = []
            for number, source in enumerate(sources):
                operand = read.get((node.address, number)) if item.operand is None else None
                made_from = ([operand], []) if operand is not None else self._made_from(source, item.point)
                points += made_from[0]
                weights += made_from[1]
            known = [name for name in dict.fromkeys(points) if name in origins or name == self._encoded]
            maker = self._maker(node)
            op, function = (maker.op, maker.function) if item.operand is None else (CACHE, "")
            origins[item.point] = Computation(op, tuple(known), tuple(dict.fromkeys(weights)), function)
        return Dataflow(origins)

    def _maker(self, node: Node) -> Node:
        """The node itself, or, for a view of an unplanned value, the node that makes that value."""
        while node.op in VIEWS and node.sources:
            viewed = self._nodes.get(node.sources[0].address)
            if viewed is None or viewed.address in self._point:
                break
            node = viewed
        return node

    def _memory(self, source: OperandSource, *, stop: bool = False) -> OperandSource:
        """The tensor that owns the memory of a view; with `stop`, the first point on the way to it, if there is one."""
        while source.op in VIEWS and source.address in self._nodes and self._nodes[source.address].sources:
            if stop and source.address in self._point:
                break
            source = self._nodes[source.address].sources[0]
        return source

    def _made_from(self, first: OperandSource, point: str) -> tuple[list[str], list[str]]:
        """The nearest points, and the weights, that a tensor is made from; for a fused product its parts, if they are points."""
        points: list[str] = []
        weights: list[str] = []
        waiting, seen = [first], set[int]()
        while waiting:
            source = waiting.pop(0)
            if source.address in seen:
                continue
            seen.add(source.address)
            if source.address in self._point:
                parts = self._views.get(source.address, [])
                points += parts if parts and point not in parts else [self._point[source.address]]
            elif source.address in self._nodes:
                waiting += self._nodes[source.address].sources
            elif source.address in self._written:
                waiting += self._written[source.address]
            elif source.name.endswith((".weight", ".bias")):
                weights.append(source.name)
                if self._encoded and _OF_THE_ENCODER.search(source.name):
                    points.append(self._encoded)
        return points, weights
