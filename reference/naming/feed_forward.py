"""Points of norms and of the feed-forward part: recognised by the weight that is multiplied, not by ggml's name of the result."""

from collections.abc import Sequence

from msgspec import Struct

from .attention import with_bias
from .structure import NORMS, Structure, stem

_NORM_WEIGHTS = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "attn_q_norm": "q_norm", "attn_k_norm": "k_norm"}
_WEIGHTLESS = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "Qcur_normed": "q_norm", "Kcur_normed": "k_norm"}
_SWIGLU = 2  # enum ggml_glu_op
_ROUTED = ("MUL_MAT_ID",)


class PointPart(Struct, frozen=True):
    """A point that is a part of a node's rows: elements start … stop − 1 of the innermost dimension."""

    name: str
    start: int
    stop: int


def norm_points(graph: Structure, inside: Sequence[int]) -> dict[int, str]:
    """Names of norms with their weight and bias. A norm of queries or keys after RoPE is no point of the vocabulary."""
    named: dict[int, str] = {}
    taken: set[str] = set()
    for i in inside:
        kind, _, ending = graph.weight(i).rpartition(".")
        point = _NORM_WEIGHTS.get(kind) if ending == "weight" and graph.nodes[i].op == "MUL" else None
        normed = i
        if point is not None:
            operand = graph.sources[i][0]
            normed = graph.base(operand) if operand is not None else i
        elif graph.nodes[i].op in NORMS and not any(graph.weight(j) for j in graph.readers[i] if graph.nodes[j].op == "MUL"):
            point = _WEIGHTLESS.get(stem(graph.nodes[i].name))
        if point is None or point in taken or graph.nodes[normed].op not in NORMS:
            continue
        if point in ("q_norm", "k_norm") and any(graph.nodes[j].op == "ROPE" for j in graph.upstream(i)):
            continue
        taken.add(point)
        named[_with_bias(graph, i)] = point
    if "ffn_norm" not in taken and (read := _read_by_feed_forward(graph, inside)) is not None:
        named.setdefault(read, "ffn_norm")
    return named


def _read_by_feed_forward(graph: Structure, inside: Sequence[int]) -> int | None:
    """The normalised value that the feed-forward's first product reads, if the norm's weight has another name."""
    for i in inside:
        operand = graph.operand(i, 1)
        if graph.nodes[i].op == "MUL_MAT" and graph.weight(i).startswith("ffn_") and operand is not None:
            read = graph.base(operand)
            biased = graph.nodes[read].op == "ADD" and graph.weight(read).endswith(".bias")
            scaled = read if graph.nodes[read].op == "MUL" else (graph.operand(read) if biased else None)
            normed = graph.operand(scaled) if scaled is not None and graph.nodes[scaled].op == "MUL" else None
            return read if normed is not None and graph.nodes[graph.base(normed)].op in NORMS else None
    return None


def _with_bias(graph: Structure, i: int) -> int:
    wanted = graph.weight(i).removesuffix("weight") + "bias"
    return next((j for j in graph.readers[i] if graph.nodes[j].op == "ADD" and graph.weight(j) == wanted), i)


def feed_forward_points(graph: Structure, inside: Sequence[int]) -> tuple[dict[int, str], dict[int, list[PointPart]]]:
    """Names of nodes, and parts of nodes: gate and up, if one product holds both.

    In a layer with routed experts, the plain `ffn_gate` and its like are the shared expert's: their names get `_shexp`.
    """
    named: dict[int, str] = {}
    parts: dict[int, list[PointPart]] = {}
    routed = any(graph.nodes[i].op in _ROUTED for i in inside)
    for i in inside:
        if graph.nodes[i].op != "MUL_MAT":
            continue
        kind = graph.weight(i).removesuffix(".weight")
        end = with_bias(graph, i)
        if kind in ("ffn_gate", "ffn_up", "ffn_down"):
            named[end] = {"ffn_down": "ffn_out"}.get(kind, kind)
        elif kind in ("ffn_gate_shexp", "ffn_up_shexp"):
            named[end] = kind
    for i in inside:
        if graph.nodes[i].op != "GLU":
            continue
        operands = [graph.base(source) for source in graph.sources[i] if source is not None]
        names = {named.get(at, "") for at in operands}
        swiglu = graph.nodes[i].op_params[0] == _SWIGLU
        if names == {"ffn_up"} and len(operands) == 1:
            parts[operands[0]] = _halves(graph, i, operands[0])
            named[operands[0]] = "ffn_gate_up"
            names = {"ffn_gate", "ffn_up"}
        if swiglu and names == {"ffn_gate", "ffn_up"}:
            named[i] = "ffn_swiglu"
        elif names and all(name.endswith("_shexp") for name in names):
            named[i] = f"{stem(graph.nodes[i].name)}_shexp"
    if routed:
        named |= _summed(graph, inside, named)
    return named, parts


def _halves(graph: Structure, glu: int, fused: int) -> list[PointPart]:
    """Gate and up in the order of the fused rows: gate first, unless the operation swaps them (ggml's op_params[1])."""
    half = graph.nodes[glu].ne[0]
    first, second = ("ffn_up", "ffn_gate") if graph.nodes[glu].op_params[1] else ("ffn_gate", "ffn_up")
    return [PointPart(first, 0, half), PointPart(second, half, 2 * half)] if graph.nodes[fused].ne[0] == 2 * half else []


def _summed(graph: Structure, inside: Sequence[int], named: dict[int, str]) -> dict[int, str]:
    """The sum of routed and shared experts, which ggml calls `ffn_out`, if no dense feed-forward has that name."""
    if "ffn_out" in named.values():
        return {}
    sums = [i for i in inside if stem(graph.nodes[i].name) == "ffn_out" and graph.nodes[i].op == "ADD"]
    return {sums[-1]: "ffn_out"} if sums else {}
