"""A layer's dataflow as a graph, laid out in rows: which point is computed from which. `templates/flow.js` draws it."""

from collections.abc import Sequence
from typing import Any

from checkpoints.answers.diff import Verdict
from checkpoints.dataflow import Dataflow, of_vocabulary
from checkpoints.points import parse
from checkpoints.record import Dump

from .numbers import clean

_LAYERS = 130  # layers that can be chosen; of more, the first ones and that of the first divergence
_NODES = 120  # points of a layer that are drawn


def flows(verdict: Verdict, points: Sequence[str], sides: Sequence[Dump]) -> dict[str, Any]:
    """The graphs of all layers with compared points, and which one is shown first.

    Args:
        points: the compared points; a node names its place among them.
        sides: the dumps, whose headers may say the dataflow; else the vocabulary's order stands in.
    """
    flow = _dataflow(points, sides)
    place = {name: number for number, name in enumerate(points)}
    status = {point.checkpoint: point.status for point in verdict.points}
    layers: dict[int | None, list[str]] = {}
    for name in flow.computations:
        point = parse(name)
        if name in place or (point.known is not None and not point.known.optional):
            layers.setdefault(point.layer, []).append(name)
    compared = [layer for layer, names in layers.items() if any(name in place for name in names)]
    shown = verdict.first_divergence or verdict.worst
    first = parse(shown.checkpoint).layer if shown is not None else None
    kept = [*compared[:_LAYERS], *([first] if first in compared[_LAYERS:] else [])]
    chosen = first if first in kept else next((layer for layer in kept if layer is not None), next(iter(kept), None))
    graphs = [_graph(layer, layers[layer][:_NODES], flow, place, status) for layer in kept]
    return {"first": kept.index(chosen) if kept else 0, "layers": graphs}


def _dataflow(points: Sequence[str], sides: Sequence[Dump]) -> Dataflow:
    for side in sides:
        if side.header is not None and side.header.dataflow:
            try:
                return Dataflow.from_json(side.header.dataflow)
            except ValueError:  # a header that the comparison has refused to use as well
                continue
    return of_vocabulary(points)


def _graph(
    layer: int | None, names: list[str], flow: Dataflow, place: dict[str, int], status: dict[str, str]
) -> dict[str, Any]:
    """Nodes with their row and column, and edges between their numbers; values from outside the layer are in the first row."""
    inside = set(names)
    edges: list[tuple[str, str]] = []
    for name in names:
        edges += [(source, name) for source in _sources(name, inside, flow)]
    outside = list(dict.fromkeys(source for source, _ in edges if source not in inside))
    every = [*outside, *names]
    number = {name: n for n, name in enumerate(every)}
    rows: dict[str, int] = dict.fromkeys(outside, 0)
    sources: dict[str, list[str]] = {name: [source for source, target in edges if target == name] for name in names}
    for name in names:  # what a point reads stands before it
        rows[name] = max((rows.get(source, 0) + 1 for source in sources[name]), default=0 if layer is None else 1)
    columns = _columns(every, rows, sources)
    nodes = [
        {
            "name": clean(name),
            "label": clean(parse(name).kind if name in inside and layer is not None else name),
            "op": clean(flow.computations[name].op),
            "row": rows[name],
            "column": columns[name],
            "point": place.get(name),
            "status": status.get(name, "" if name not in place else "agrees"),
        }
        for name in every
    ]
    label = "whole model" if layer is None else f"layer {layer}"
    return {"label": label, "nodes": nodes, "edges": [[number[source], number[target]] for source, target in edges]}


def _sources(name: str, inside: set[str], flow: Dataflow) -> list[str]:
    """The drawn points that a point is computed from, found through points that are not drawn. Outside the layer the search ends at
    points of the vocabulary."""
    sources: dict[str, None] = {}
    waiting, seen = list(reversed(flow.computations[name].reads)), set[str]()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in inside or parse(source).known is not None or not flow.computations[source].reads:
            sources[source] = None
        else:
            waiting += reversed(flow.computations[source].reads)
    return list(sources)


def _columns(names: Sequence[str], rows: dict[str, int], sources: dict[str, list[str]]) -> dict[str, float]:
    """The column of each node, 0 in the middle: below the mean of the nodes that it reads, beside the others in its row."""
    columns: dict[str, float] = {}
    for row in range(max(rows.values(), default=-1) + 1):
        members = [name for name in names if rows[name] == row]

        def wanted(name: str) -> float:
            above = [columns[source] for source in sources.get(name, ()) if source in columns]
            return sum(above) / len(above) if above else 0.0

        ranked = sorted(members, key=wanted)
        middle = sum(map(wanted, ranked)) / len(ranked) if ranked else 0.0
        for place, name in enumerate(ranked):
            columns[name] = middle + place - (len(ranked) - 1) / 2
    return columns
