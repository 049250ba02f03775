"""From ggml's nodes to points: which node of the graph stands for which name of the vocabulary.

ggml's names repeat (`Qcur-0` is a product, a sum, a view and a rotation) and drift between versions, so a node is told by
its name, operation, first operand and occurrence. A node without a point keeps its own name as `blk.N.<node>`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from checkpoints import points

from .jobs import Node

Signature = tuple[str, str, str, int]

VIEWS = frozenset({"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
_WRITES = frozenset({"SET_ROWS", "CPY"})  # into the cache: what is read from it again is k_read and v_read
_LAYER = re.compile(r"(.+?)-(\d+)((?: \(.*\))*)")
_WEIGHT = re.compile(r"blk\.(\d+)\.(.+)")
_CACHE = re.compile(r"cache_([kv])_l(\d+)\b.*")
_OTHER_NAMES = {"Qcur_normed": "q_norm", "Kcur_normed": "k_norm", "sa_out": "ffn_inp"}
_SAME = frozenset({"attn_norm", "kq_soft_max", "kqv_out", "ffn_inp", "ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu"})
_LAST = frozenset({"ffn_out", "l_out", "attn_out"})
_MODEL = {"result_norm": points.OUTPUT_NORM, "result_output": points.LOGITS}
_EMBEDDINGS = ("inp_scaled", "embd", "inp_embd")  # Gemma scales: layers read what comes after


@dataclass(frozen=True)
class Planned:
    """A value to take: `operand` None means the node's own, a number one of its sources'.

    `node.point` is the point. `heads_first` tells that ggml puts the positions behind the heads: [H, T, …].
    """

    node: Node
    signature: Signature
    operand: int | None = None
    heads_first: bool = False

    @property
    def point(self) -> str:
        """The canonical name."""
        return self.node.point


class Signer:
    """Gives each node of one pass through a graph its signature; the same graph gives the same ones."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[str, str, str]] = Counter()

    def sign(self, name: str, op: str, first: str) -> Signature:
        """(name, operation, first operand, occurrence); numbers that ggml gives to unnamed nodes are left out."""
        stem = (_anonymous(name), op, _anonymous(first))
        self._seen[stem] += 1
        return (*stem, self._seen[stem])


def _anonymous(name: str) -> str:
    return re.sub(r"^(node|leaf)_\d+", r"\1", name) if name.startswith(("node_", "leaf_")) else name


def plan(nodes: Sequence[Node], *, offset: int = 0) -> list[Planned]:
    """The values that a graph makes, in the order in which it computes them.

    `offset` is added to the layers' numbers, for a window that starts at that layer.
    """
    signer = Signer()
    signatures = [signer.sign(node.name, node.op, node.sources[0].name if node.sources else "") for node in nodes]
    layers = _layers(nodes)
    named: dict[int, str] = {}
    operands: dict[int, tuple[int, str]] = {}
    for own in sorted({layer for layer in layers if layer is not None}):
        inside = [i for i, number in enumerate(layers) if number == own]
        names, reads = _name_layer(nodes, inside)
        named |= {i: points.in_layer(own + offset, name) for i, name in names.items()}
        operands |= {i: (source, points.in_layer(own + offset, name)) for i, (source, name) in reads.items()}
    outside = [i for i, number in enumerate(layers) if number is None]
    named |= _name_model(nodes, outside)
    taken = set(named.values())
    planned: list[Planned] = []
    for i, node in enumerate(nodes):
        if i in operands:
            source, point = operands[i]
            planned.append(Planned(replace(node, point=point), signatures[i], source))
        if i in named:
            point = named[i]
        elif node.op in VIEWS or node.op in _WRITES or _is_selection(node):
            continue
        else:
            layer = layers[i]
            point = _free(_open_name(node, None if layer is None else layer + offset), taken)
            taken.add(point)
        planned.append(Planned(replace(node, point=point), signatures[i], None, _heads_first(point)))
    return planned


def _is_selection(node: Node) -> bool:
    """The last layer's copies of the rows whose logits were asked for: values that stand elsewhere already."""
    return node.op == "GET_ROWS" and any(source.name in ("out_ids", "inp_out_ids") for source in node.sources)


def _heads_first(point: str) -> bool:
    kind = points.parse(point).kind
    return kind.startswith("kq") and kind != "kqv_out"


def _layers(nodes: Sequence[Node]) -> list[int | None]:
    """The layer of each node: from its name, else its weight's, its cache's, or its operands' name."""
    found: dict[str, int] = {}
    layers: list[int | None] = []
    for node in nodes:
        layer = _layer_of(node.name)
        for source in node.sources:
            if layer is None:
                layer = _layer_of(source.name)
        if layer is None and not node.name.startswith(("result", "norm", "inp", "embd")):
            layer = max((found[source.name] for source in node.sources if source.name in found), default=None)
        if node.name in _MODEL or node.name in ("norm", *_EMBEDDINGS):
            layer = None
        if layer is not None:
            found[node.name] = layer
        layers.append(layer)
    return layers


def _layer_of(name: str) -> int | None:
    for pattern, group in ((_LAYER, 2), (_WEIGHT, 1), (_CACHE, 2)):
        if match := pattern.fullmatch(name):
            return int(match[group])
    return None


def _stem(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return match[1] + match[3] if match else name


def _name_layer(nodes: Sequence[Node], inside: Sequence[int]) -> tuple[dict[int, str], dict[int, tuple[int, str]]]:
    """Points of one layer: node index -> name, and node index -> (operand, name) for what attention reads."""
    named: dict[int, str] = {}
    by_name: dict[str, list[int]] = {}
    for i in inside:
        by_name.setdefault(_stem(nodes[i].name), []).append(i)
    for letter in "QKV":
        named |= _name_projection(nodes, by_name.get(f"{letter}cur", []), letter.lower())
    for name, group in by_name.items():
        values = [i for i in group if nodes[i].op not in VIEWS]
        if not values:
            continue
        if name in _OTHER_NAMES and _OTHER_NAMES[name] not in by_name:
            named[values[-1]] = _OTHER_NAMES[name]
        elif name in _SAME or name in _LAST:
            named[values[-1]] = name
    projected = _projection(nodes, inside, "attn_output")
    if projected is not None:
        named = {i: name for i, name in named.items() if name != "attn_out"}
        named[projected] = "attn_out"
    return _name_attention(nodes, inside, named)


def _name_projection(nodes: Sequence[Node], group: Sequence[int], letter: str) -> dict[int, str]:
    """`Qcur-N` and its like: the rotation, and the last value before it (after bias); a fused QKV makes only views."""
    rotated = [i for i in group if nodes[i].op == "ROPE"]
    before = [i for i in group if not rotated or i < rotated[0]]
    values = [i for i in before if nodes[i].op not in VIEWS] or [i for i in before if nodes[i].op == "VIEW"] or before
    named = {values[-1]: letter} if values else {}
    if rotated and letter != "v":
        named[rotated[0]] = f"{letter}_rope"
    return named


def _projection(nodes: Sequence[Node], inside: Sequence[int], weight: str) -> int | None:
    """The product with a layer's weight, or the sum with its bias right after it."""
    for i in inside:
        sources = [source.name for source in nodes[i].sources]
        if nodes[i].op != "MUL_MAT" or not re.fullmatch(rf"blk\.\d+\.{weight}\.weight", sources[0]):
            continue
        bias = sources[0].removesuffix("weight") + "bias"
        for j in inside:
            if j > i and nodes[j].op == "ADD" and [source.name for source in nodes[j].sources] == [nodes[i].name, bias]:
                return j
        return i
    return None


def _name_attention(
    nodes: Sequence[Node], inside: Sequence[int], named: dict[int, str]
) -> tuple[dict[int, str], dict[int, tuple[int, str]]]:
    """The two products of attention, told by their names or, where a version leaves them unnamed, by what they read."""
    operands: dict[int, tuple[int, str]] = {}
    scores: int | None = None
    weights: str | None = None
    for i in inside:
        node = nodes[i]
        stem = _stem(node.name)
        if node.op == "MUL_MAT" and scores is None and (stem == "kq" or node.sources[0].name.startswith("cache_k_l")):
            scores = i
            named[i] = "kq"
            operands[i] = (0, "k_read")
        elif node.op == "SOFT_MAX" and scores is not None and weights is None:
            weights = node.name
            named = {index: name for index, name in named.items() if name != "kq_soft_max"}
            named[i] = "kq_soft_max"
        elif node.op == "MUL_MAT" and weights is not None and len(operands) == 1 and _reads(node, weights):
            operands[i] = (0, "v_read")
    return named, operands


def _reads(node: Node, name: str) -> bool:
    return len(node.sources) > 1 and node.sources[1].name == name


def _name_model(nodes: Sequence[Node], outside: Sequence[int]) -> dict[int, str]:
    """Points that stand once in the model: embedding, final norm, logits."""
    named: dict[int, str] = {}
    for name in _EMBEDDINGS:
        found = [i for i in outside if nodes[i].name == name and nodes[i].op not in VIEWS]
        if found:
            named[found[-1]] = points.EMBD
            break
    for name, point in _MODEL.items():
        found = [i for i in outside if nodes[i].name == name and nodes[i].op not in VIEWS]
        if found:
            named[found[-1]] = point
    return named


def _open_name(node: Node, layer: int | None) -> str:
    """The name of a node that the vocabulary doesn't have."""
    name = _stem(node.name) if layer is not None else node.name
    name = re.sub(r" \(([^)]*)\)", r"_\1", name)
    if re.fullmatch(r"(node|leaf)_\d+", name):
        name = node.op.lower()
    if layer is not None:
        return points.in_layer(layer, name)
    # A bare `norm` is an alias of the point after the norm's weight, which this is not.
    return name if points.resolve(name) == name and name not in points.KINDS else f"node.{name}"


def _free(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    number = 2
    while f"{name}.{number}" in taken:
        number += 1
    return f"{name}.{number}"
