"""Points that occur once in a model: the input of the first layer, the final norm, logits, the pooled embedding."""

from collections.abc import Sequence

from checkpoints import points

from ..jobs import Node
from .planned import VIEWS
from .structure import NORMS, Structure, is_selection

POOLED = "result_embd_pooled"
_EMBEDDINGS = ("inp_scaled", "embd", "inp_embd")
_FINAL_NORM = ("output_norm.", "enc.output_norm.", "dec.output_norm.")


def model_points(graph: Structure, outside: Sequence[int]) -> dict[int, str]:
    """Names of nodes outside the layers, by index."""
    named: dict[int, str] = {}
    values = [i for i in outside if graph.nodes[i].op not in VIEWS]
    if (embedding := _embedding(graph, values)) is not None:
        named[embedding] = points.EMBD
    norm = [i for i in values if _is_final_norm(graph, i)] or [i for i in values if _is_selected_as_final(graph, i)]
    if norm:
        named[norm[-1]] = points.OUTPUT_NORM
    rows = _vocabulary(graph.nodes)
    scores = [i for i in values if graph.nodes[i].name == "result_output" or graph.nodes[i].ne[0] == rows]
    if scores:
        named[scores[-1]] = points.LOGITS
    return named


def _embedding(graph: Structure, values: Sequence[int]) -> int | None:
    """The value that the first layer reads: the tokens' rows after any preprocessing. Several streams are not an embedding."""
    entering = graph.inputs.get(min(graph.inputs)) if graph.inputs else None
    if entering is not None and entering in values and not _is_several_streams(graph, entering):
        return entering
    for name in _EMBEDDINGS:
        matching = [i for i in values if graph.nodes[i].name == name]
        if matching:
            return matching[-1]
    return next((i for i in values if graph.nodes[i].op == "GET_ROWS"), None)


def _is_several_streams(graph: Structure, i: int) -> bool:
    """Whether a value has several rows of a token: [D, T, streams], or [D, streams, T], which over one token is [D, streams, 1]."""
    shape = graph.nodes[i].ne
    looked_up = (node for node in graph.nodes if any(source.name == "token_embd.weight" for source in node.sources[:1]))
    tokens = next((node.ne[1] for node in looked_up if node.op == "GET_ROWS"), shape[1])
    return shape[2] > 1 or shape[1] != tokens


def _is_final_norm(graph: Structure, i: int) -> bool:
    node = graph.nodes[i]
    if any(source.name.startswith(_FINAL_NORM) for source in node.sources):
        return node.op in ("MUL", "ADD")
    return node.name == "result_norm" and (node.op in NORMS or node.op in ("MUL", "ADD"))


def _is_selected_as_final(graph: Structure, i: int) -> bool:
    """Whether a norm is the final one only by the name of the rows that are selected from it."""
    chosen = (graph.nodes[j] for j in graph.readers[i])
    return graph.nodes[i].op in NORMS and any(node.name == "result_norm" and is_selection(node) for node in chosen)


def _vocabulary(nodes: Sequence[Node]) -> int:
    """The number of rows of the token embedding; 0 if there is none."""
    for node in nodes:
        for source in node.sources:
            if source.name == "token_embd.weight":
                return source.ne[1]
    return 0
