"""The plan: every value of a graph that has a name, in the order of computation."""

import re
from collections.abc import Sequence

from msgspec.structs import replace

from checkpoints import points

from ..jobs import Node
from .attention import attention_points
from .feed_forward import PointPart, feed_forward_points, norm_points
from .once import POOLED, model_points
from .planned import VIEWS, Planned, Signer
from .structure import WRITES, Structure, is_selection, stem

_ORDERS = frozenset({"ARGSORT"})  # of all experts: the chosen ones are a value of their own
_SCANS = frozenset(
    {"SSM_SCAN", "GATED_DELTA_NET", "RWKV_WKV6", "RWKV_WKV7", "GATED_LINEAR_ATTN"}
)  # rows and states in one value
_OF_ATTENTION = frozenset({"Qcur", "Kcur", "Vcur", "kq", "kq_soft_max", "kqv", "kqv_out", "v_cont"})
_WEIGHTED = frozenset({"MUL_MAT", "MUL_MAT_ID", "MUL", "ADD"})


def plan(nodes: Sequence[Node], *, offset: int = 0, prefix: str = "") -> list[Planned]:
    """The values that a graph makes, in the order of computation.

    Args:
        offset: added to the layers' numbers, for a window that starts at that layer.
        prefix: in front of every name, for the encoder of an encoder–decoder.
    """
    signer = Signer()
    signatures = [signer.sign(node.name, node.op, node.sources[0].name if node.sources else "") for node in nodes]
    graph = Structure(nodes)
    named, operands, parts = _name(graph, offset)
    taken = {*named.values(), *(points.in_layer(layer + offset, part.name) for layer, part in _parts(graph, parts))}
    planned: list[Planned] = []

    def add(i: int, point: str, **how: object) -> None:
        planned.append(Planned(replace(nodes[i], point=prefix + point), signatures[i], **how))  # type: ignore[arg-type]

    for i, node in enumerate(nodes):
        layer = graph.layers[i]
        if i in operands:
            source, point = operands[i]
            add(i, point, operand=source)
        if 0 in node.ne or is_selection(node):
            continue
        once = node.name == POOLED or _is_state(graph, i)
        if i in named:
            add(i, named[i])
        elif once or _is_value(graph, i):
            point = _free(_open_name(graph, i, None if layer is None else layer + offset), taken)
            taken.add(point)
            add(i, point, once=once)
        for part in parts.get(i, ()):
            if layer is not None:
                add(i, points.in_layer(layer + offset, part.name), part=(part.start, part.stop))
    return planned


def _name(graph: Structure, offset: int) -> tuple[dict[int, str], dict[int, tuple[int, str]], dict[int, list[PointPart]]]:
    """The points of the vocabulary that nodes, operands and parts of nodes stand for, by index."""
    named: dict[int, str] = {}
    operands: dict[int, tuple[int, str]] = {}
    parts: dict[int, list[PointPart]] = {}
    nodes_of: dict[int, list[int]] = {}
    for i, number in enumerate(graph.layers):
        if number is not None:
            nodes_of.setdefault(number, []).append(i)
    for layer, inside in sorted(nodes_of.items()):
        attention = attention_points(graph, inside)
        forward, halves = feed_forward_points(graph, inside)
        kinds = forward | norm_points(graph, inside) | attention.nodes
        if (leaving := graph.outputs.get(layer)) is not None:
            kinds[leaving] = "l_out"
        kinds |= _residual(graph, inside, kinds)
        named |= {i: points.in_layer(layer + offset, kind) for i, kind in kinds.items()}
        operands |= {i: (source, points.in_layer(layer + offset, kind)) for i, (source, kind) in attention.operands.items()}
        parts |= halves
    named |= model_points(graph, [i for i, number in enumerate(graph.layers) if number is None])
    return named, operands, parts


def _parts(graph: Structure, parts: dict[int, list[PointPart]]) -> list[tuple[int, PointPart]]:
    return [
        (layer, part)
        for i, parts_of_layer in parts.items()
        for part in parts_of_layer
        if (layer := graph.layers[i]) is not None
    ]


def _residual(graph: Structure, inside: Sequence[int], kinds: dict[int, str]) -> dict[int, str]:
    """Attention plus residual: the sum with the layer's input, if the feed-forward comes after it."""
    if not inside or "ffn_inp" in kinds.values():
        return {}
    layer = graph.layers[inside[0]]
    entering = None if layer is None or layer not in graph.inputs else _plain(graph, graph.inputs[layer])
    leaving = None if layer is None else graph.outputs.get(layer)
    if leaving is None or "kq" not in kinds.values():
        return {}
    for i in inside:
        # A hidden state that is given from outside, as in a window, is a leaf.
        sources = {None if source is None else _plain(graph, source) for source in graph.sources[i]}
        if graph.nodes[i].op != "ADD" or i == leaving or entering not in sources or i in kinds or graph.weight(i):
            continue
        before = set(graph.upstream(i))
        if any(kinds.get(j) == "ffn_out" for j in before) or not any(kinds.get(j) == "kq" for j in before):
            continue
        return {i: "ffn_inp"}
    return {}


def _plain(graph: Structure, i: int) -> int | None:
    """A value before it was scaled or its rows were selected; None if that is a leaf."""
    i = graph.base(i)
    while graph.nodes[i].op == "SCALE" or is_selection(graph.nodes[i]):
        if (source := graph.operand(i)) is None:
            return None
        i = graph.base(source)
    return i


def _is_value(graph: Structure, i: int) -> bool:
    """Whether a node without a point is a value of its own: not a view, a write, or the sorted list of all experts."""
    node = graph.nodes[i]
    if node.op in VIEWS:
        return stem(node.name) == "ffn_moe_topk" or _is_rows_of_scan(graph, i)
    if node.op == "SCALE" and (source := graph.operand(i)) is not None and graph.leaf(source):
        return False  # the state of a new sequence, set to zero in its place
    return node.op not in WRITES | _ORDERS | _SCANS


def _is_rows_of_scan(graph: Structure, i: int) -> bool:
    """Whether a node is a view of the rows that a scan computed; its other views show the states."""
    source = graph.operand(i)
    return source is not None and graph.nodes[source].op in _SCANS and not _is_written(graph, i)


def _is_written(graph: Structure, i: int) -> bool:
    return any(graph.nodes[j].op in WRITES and i in (graph.sources[j] or ()) for j in range(i + 1, len(graph.nodes)))


def _is_state(graph: Structure, i: int) -> bool:
    """Whether a node writes a sequence's state after the pass."""
    node = graph.nodes[i]
    target = graph.operand(i, 1)
    if node.op != "CPY" or target is None:
        return False
    leaf = graph.leaf(target)
    return bool(leaf) and not leaf.startswith(("cache_k_l", "cache_v_l"))


def _open_name(graph: Structure, i: int, layer: int | None) -> str:
    """The name of a node that is not in the vocabulary: ggml's, unless it says something untrue."""
    node = graph.nodes[i]
    name = stem(node.name)
    if _is_state(graph, i):
        target = graph.operand(i, 1)
        name = re.sub(r"(_l\d+|-\d+)$", "", graph.leaf(target)) if target is not None else name
    elif node.op in VIEWS and _is_rows_of_scan(graph, i):
        source = graph.operand(i)
        if source is not None and name.startswith(("node_", stem(graph.nodes[source].name))):
            name = graph.nodes[source].op.lower()
    name = re.sub(r" \(([^)]*)\)", r"_\1", name.rpartition("{}.")[2])
    if name == "pos_bias":  # it is added to the scores, and padded like them
        name = "kq_b"
    if name in _OF_ATTENTION and _crosses(graph, i):
        return points.in_layer(layer, f"cross_{name}") if layer is not None else f"cross_{name}"
    if re.fullmatch(r"(node|leaf)_\d+\w*|_?", name):
        name = _by_weight(graph, i) or node.op.lower()
    elif layer is not None and name in points.KINDS:  # the graph shows that it is another value
        name = _by_weight(graph, i) or f"{name}.{node.op.lower()}"
    if layer is not None:
        return points.in_layer(layer, name)
    # A bare `norm` would be an alias of the point after the norm's weight, which is another value.
    return name if points.resolve(name) == name and name not in points.KINDS else f"node.{name}"


def _crosses(graph: Structure, i: int) -> bool:
    """Whether a node belongs to attention over an encoder's output."""
    inside = (j for j in (i, *graph.upstream(i)) if graph.layers[j] == graph.layers[i])
    return any(".cross_attn_" in f".{graph.weight(j)}" for j in inside)


def _by_weight(graph: Structure, i: int) -> str:
    """The name of the weight that a node reads, if the vocabulary has no point of that name."""
    name = graph.weight(i).rpartition(".")[0]
    return name if graph.nodes[i].op in _WEIGHTED and "." not in name and name not in points.KINDS else ""


def _free(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    number = 2
    while f"{name}.{number}" in taken:
        number += 1
    return f"{name}.{number}"
