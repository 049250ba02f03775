"""Points of attention: the inputs of its two products, traced backwards from the products."""

import re
from collections import Counter
from collections.abc import Sequence
from math import prod

from msgspec import Struct, field

from .planned import VIEWS
from .structure import NORMS, WRITES, Structure, stem

_CHANGES = ("ROPE", "PAD", "CONCAT", "MUL_MAT")
_FUSED = "attn_qkv.weight"
_QUERY = ("attn_q.weight", "attn_q_b.weight", _FUSED)
_KEY = ("attn_k.weight", _FUSED)
_VALUE = ("attn_v.weight", _FUSED)
_OUTPUT = ("attn_output.weight", "attn_o.weight")


class Points(Struct):
    """The names of one layer: of nodes, by index, and of operands, by the index of the node that reads them."""

    nodes: dict[int, str] = field(default_factory=dict)
    operands: dict[int, tuple[int, str]] = field(default_factory=dict)


def attention_points(graph: Structure, inside: Sequence[int]) -> Points:
    """The points of a layer's (first) attention; empty if it has none."""
    points = Points()
    scores = next((i for i in inside if _is_scores(graph, i)), None)
    if scores is None:
        return points
    weights = next((i for i in inside if i > scores and graph.nodes[i].op == "SOFT_MAX" and scores in graph.upstream(i)), None)
    mixed = next((i for i in inside if weights is not None and _reads(graph, i, weights)), None)
    if weights is None or mixed is None:
        return points
    points.nodes |= {scores: "kq", weights: "kq_soft_max"}
    if re.fullmatch(r"node_\d+", stem(graph.nodes[mixed].name)):  # llama.cpp of 2025 gave it no name
        points.nodes[mixed] = "kqv"
    points.nodes |= _between(graph, inside, scores, weights)
    cached = False
    if _cache(graph, graph.sources[scores][0]):
        cached = True
        points.operands[scores] = (0, "k_read")
        points.operands[mixed] = (0, "v_read")
    points.nodes |= _mixed(graph, inside, mixed)
    queries = graph.sources[scores][1]
    keys = _written(graph, inside, "k") if cached else graph.sources[scores][0]
    values = _written(graph, inside, "v") if cached else graph.sources[mixed][0]
    for letter, end, names in (("q", queries, _QUERY), ("k", keys, _KEY), ("v", values, _VALUE)):
        if end is None:
            continue
        if letter != "v" and (rotated := _rotated(graph, end)) is not None:
            points.nodes[rotated] = f"{letter}_rope"
        start = _projected(graph, end, names)
        if start is not None:
            points.nodes.setdefault(start, letter)
    return points


def _between(graph: Structure, inside: Sequence[int], scores: int, weights: int) -> dict[int, str]:
    """Names for unnamed nodes between the scores and their soft max, which are scores, too: "kq_scale", "kq_unary", "kq_scale.2"."""
    before, counts = set(graph.upstream(weights)), Counter[str]()
    named: dict[int, str] = {}
    for i in inside:
        node = graph.nodes[i]
        unnamed = re.fullmatch(r"node_\d+", stem(node.name)) is not None
        if scores < i < weights and i in before and unnamed and node.op not in VIEWS and scores in set(graph.upstream(i)):
            kind = f"kq_{node.op.lower()}"
            counts[kind] += 1
            named[i] = kind if counts[kind] == 1 else f"{kind}.{counts[kind]}"
    return named


def _is_scores(graph: Structure, i: int) -> bool:
    """Whether a node is a product of keys and queries: one with the contents of a cache of keys, or one that ggml names so."""
    node = graph.nodes[i]
    if node.op != "MUL_MAT" or graph.weight(i):
        return False
    return stem(node.name) == "kq" or _cache(graph, graph.sources[i][0]) == "k"


def _cache(graph: Structure, i: int | None) -> str:
    """ "k" or "v" if a value is (a copy of) the contents of a cache of keys or values, else ""."""
    while i is not None:
        leaf = graph.leaf(i)
        if leaf:
            return leaf[6] if leaf.startswith(("cache_k_l", "cache_v_l")) else ""
        i = graph.base(i)
        i = graph.sources[i][0] if graph.nodes[i].op in ("CONT", "CPY", "CAST") else None
    return ""


def _reads(graph: Structure, i: int, weights: int) -> bool:
    """Whether a product's second operand is the attention weights."""
    sources = graph.sources[i]
    return graph.nodes[i].op == "MUL_MAT" and len(sources) > 1 and sources[1] is not None and graph.base(sources[1]) == weights


def _mixed(graph: Structure, inside: Sequence[int], mixed: int) -> dict[int, str]:
    """The names of the weighted values side by side, and of the output projection with its bias."""
    named: dict[int, str] = {}
    at = mixed
    for _ in range(2):  # latent values are multiplied with a weight first
        readers = [i for i in graph.readers[at] if i in inside]
        joined = next((i for i in readers if graph.nodes[i].op == "CONT"), None)
        if joined is not None:
            named[joined] = "kqv_out"
            break
        if len(readers) != 1 or graph.nodes[readers[0]].op != "MUL_MAT":
            break
        at = readers[0]
    product = next((i for i in inside if graph.nodes[i].op == "MUL_MAT" and graph.weight(i) in _OUTPUT), None)
    if product is not None:
        named[with_bias(graph, product)] = "attn_out"
    return named


def with_bias(graph: Structure, product: int) -> int:
    """The sum of a product and its bias, or the product if it has no bias."""
    wanted = graph.weight(product).removesuffix("weight") + "bias"
    for i in graph.readers[product]:
        if graph.nodes[i].op in ("ADD", "ADD_ID") and graph.weight(i) == wanted:
            return i
    return product


def _written(graph: Structure, inside: Sequence[int], letter: str) -> int | None:
    """The value that is written into the layer's cache of keys or values."""
    for i in inside:
        node = graph.nodes[i]
        # The cache is an operand of the node, or only in its name: a view of the cache (llama.cpp of 2025).
        names = (node.name, *(source.name for source in node.sources))
        if node.op in WRITES and any(name.startswith(f"cache_{letter}_l") for name in names):
            return graph.sources[i][0]
    return None


def _size(graph: Structure, i: int) -> int:
    return prod(graph.nodes[i].ne)


def _rotated(graph: Structure, end: int) -> int | None:
    """The first value of all heads to which RoPE has been applied: the rotation, or its parts put together again."""
    whole = sorted(i for i in graph.upstream(end) if graph.nodes[i].op not in VIEWS and _size(graph, i) == _size(graph, end))
    return next((i for i in whole if any(graph.nodes[j].op == "ROPE" for j in graph.upstream(i))), None)


def _projected(graph: Structure, end: int, weights: tuple[str, ...]) -> int | None:
    """The queries, keys or values as they leave the product with a weight: with their bias, before norm and rotation."""
    chain = _chain(graph, end, weights)
    if not chain:
        return None
    product, size = chain[-1], _size(graph, _unpadded(graph, end))
    whole = with_bias(graph, product)
    plain = [i for i in reversed(chain) if i >= whole and _size(graph, i) == size and not _changed(graph, i, whole)]
    if plain:
        return plain[0]
    return whole if graph.weight(product) != _FUSED else None  # latent attention uses queries of another size


def _unpadded(graph: Structure, end: int) -> int:
    """The value itself, where it is written into a cache that has more values per position in other layers."""
    at = graph.base(end)
    source = graph.sources[at][0] if graph.nodes[at].op == "PAD" else None
    return end if source is None else source


def _changed(graph: Structure, i: int, whole: int) -> bool:
    """Whether a norm, a rotation, padding or another product lies between a product and `whole`."""
    return any(graph.nodes[j].op in (*NORMS, *_CHANGES) for j in graph.upstream(i) if j > whole)


def _chain(graph: Structure, end: int, weights: tuple[str, ...]) -> list[int]:
    """The values from `end` back to a product with one of the weights, views included; empty if no such product is on the way."""
    paths: list[list[int]] = [[end]]
    seen = {end}
    while paths:
        path = paths.pop(0)
        at = path[-1]
        if graph.nodes[at].op == "MUL_MAT" and graph.weight(at) in weights:
            return path
        for source in graph.sources[at]:
            if source is not None and source not in seen and graph.layers[source] == graph.layers[end]:
                seen.add(source)
                paths.append([*path, source])
    return []
