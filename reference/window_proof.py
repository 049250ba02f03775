"""Proves that layers by themselves compute what they do in the whole model: both graphs are listed and compared, node by node.

A window renumbers its layers. If llama.cpp builds a layer by its number (patterns of attention windows, dense layers in front,
layers without RoPE), or changes the hidden state before the first layer, the graphs differ, and the model cannot be cut into
windows. Nothing is computed, and a window's file has holes instead of weights.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.errors import InputError, ModelError, ReferenceFailed
from checkpoints.gguf_file import Contents

from .jobs import Node, OperandSource
from .library import Library
from .model import Model
from .naming.planned import VIEWS
from .naming.structure import Structure, is_selection
from .rows import Survey, survey
from .session import Session
from .windows import Window, open_window, vocabulary_of

_ROPE, _SECTIONS = "ROPE", 8  # bit of a rotation's mode: positions along several axes (GGML_ROPE_TYPE_MROPE)
_NUMBER = re.compile(r"(?<=-)\d+(?= \(|$)|(?<=^blk\.)\d+|(?<=_l)\d+(?= \(|$)")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_UNNAMED = re.compile(r"^(node|leaf)_\d+")
_VOCABULARY = ("token_embd.weight", "output.weight")
_Key = tuple[object, ...]


class Proof(Struct, frozen=True):
    """The proof that a model's windows are the model: what the whole model computes, and whether a window needs an output matrix."""

    whole: Survey
    untied: bool


class _Listed(Struct, frozen=True):
    """A graph's nodes and masks."""

    nodes: Sequence[Node]
    masks: Sequence[bytes]


def prove(
    library: Library, contents: Contents, spans: Sequence[tuple[int, int]], tokens: Sequence[int], *, hidden: bool = False
) -> Proof:
    """Compare the windows [first, stop) with the whole model, for a pass over these tokens; `hidden`: even layer 0 gets a hidden state.

    Raises:
        InputError: a window computes something else, or is not possible; the message names the first layer or operation that differs.
    """
    if not any(tensor.name == "token_embd.weight" for tensor in contents.tensors):
        raise refusal(contents, "it has no token embedding")
    numbers = {int(match[1]) for tensor in contents.tensors if (match := _BLOCK.match(tensor.name))}
    if len(numbers) < contents.layers:
        raise refusal(contents, f"its {contents.layers} layers use {len(numbers)} blocks of weights")
    with Model(library, contents.path) as model:
        if model.embeds or model.encoder_decoder:
            raise refusal(contents, "it is not a decoder only")
        with Session(model, n_ctx=len(tokens), n_batch=len(tokens)) as session:
            whole = survey(session, tokens)
            listed = _Listed(whole.nodes, session.tap.masks_of(session.list_nodes(tokens)))
        width = model.n_embd
    graph = Structure(listed.nodes)
    _one_mask(contents, listed, graph)
    _both_memories(contents, listed, graph, spans)
    untied = False
    for first, stop in spans:
        window = Window(first, stop, tuple(tokens) if first == 0 and not hidden else None, untied)
        inputs = _inputs(contents, window, width, len(tokens))
        try:
            alone = _list(library, contents, window, inputs)
        except ModelError as error:
            if stop < contents.layers or untied:
                reason = error.message.rpartition(f"{contents.path.suffix}: ")[2].rstrip(".")
                raise refusal(contents, f"llama.cpp loads no {_span(first, stop)} of it ({reason})") from error
            untied = True  # this architecture cannot use the embedding as its output matrix
            alone = _list(library, contents, Window(first, stop, window.ids, untied), inputs)
        _compare(contents, (listed, graph), alone, window)
    return Proof(whole, untied)


def refusal(contents: Contents, reason: str) -> InputError:
    """The error, one line, that says why a model cannot be cut into windows."""
    return InputError(
        f"{contents.architecture} cannot be computed window by window: {reason}.", "Leave --window out.", code="window"
    )


def _span(first: int, stop: int) -> str:
    return f"layer {first}" if stop == first + 1 else f"stretch of layers {first} to {stop - 1}"


def _inputs(contents: Contents, window: Window, width: int, count: int) -> Sequence[int] | NDArray[np.float32]:
    if window.ids is None:
        return np.zeros((count, width), np.float32)
    if window.stop == contents.layers:
        return window.ids
    n_vocab = next(tensor.ne[1] for tensor in contents.tensors if tensor.name == "token_embd.weight")
    place = {number: row for row, number in enumerate(vocabulary_of(window.ids, n_vocab))}
    return tuple(place[token] for token in window.ids)


def _list(library: Library, contents: Contents, window: Window, inputs: Sequence[int] | NDArray[np.float32]) -> _Listed:
    with open_window(library, contents, window, hollow=True) as model:
        try:
            with Session(model, n_ctx=len(inputs), n_batch=len(inputs)) as session:
                nodes = session.list_nodes(inputs)
                return _Listed(nodes, session.tap.masks_of(nodes))
        except ReferenceFailed as error:
            raise ModelError(error.message, error.advice, code=error.code) from error


def _one_mask(contents: Contents, listed: _Listed, graph: Structure) -> None:
    """Require that all layers share one mask: a renumbered layer could get another's, and only a long prompt would show it."""
    masks = {
        node.sources[1].address
        for i, node in enumerate(listed.nodes)
        if node.op == "SOFT_MAX" and len(node.sources) > 1 and graph.layers[i] is not None
    }
    if len(masks) > 1:
        raise refusal(contents, "its layers attend through different masks")
    if any(node.op == _ROPE and node.op_params[2] & _SECTIONS for node in listed.nodes):
        raise refusal(contents, "its positions have several axes, which cannot be given with a hidden state")


def _both_memories(contents: Contents, listed: _Listed, graph: Structure, spans: Sequence[tuple[int, int]]) -> None:
    """Require both a KV cache and states in each window of a model that has both: ggml aborts if one is missing."""
    cached = {
        _cache_layer(node) for node in listed.nodes if any(source.name.startswith("cache_k_l") for source in node.sources)
    }
    states = {
        graph.layers[i] for i, node in enumerate(listed.nodes) if node.op == "CPY" and graph.layers[i] is not None
    } - cached
    for first, stop in spans if cached and states else ():
        span = set(range(first, stop))
        if not (span & cached and span & states):
            raise refusal(contents, f"{_span(first, stop)} has only attention, or none, where llama.cpp builds both")


def _cache_layer(node: Node) -> int | None:
    names = [source.name for source in node.sources if source.name.startswith("cache_k_l")]
    match = re.search(r"_l(\d+)", names[0]) if names else None
    return int(match[1]) if match else None


def _compare(contents: Contents, whole: tuple[_Listed, Structure], alone: _Listed, window: Window) -> None:
    whole_listing, whole_graph = whole
    alone_listing, alone_graph = alone, Structure(alone.nodes)
    last = window.stop == contents.layers
    own = [i for i, layer in enumerate(alone_graph.layers) if last or layer is not None or _before(alone_graph, i)]
    span = [i for i in range(len(whole_listing.nodes)) if _in_span(whole_graph, i, window, last=last)]
    pairs = zip(_keys(whole_listing, whole_graph, span, window.first), _keys(alone_listing, alone_graph, own, 0), strict=False)
    count = 0
    for (i, expected), (j, have) in pairs:
        count += 1
        if expected != have:
            raise _difference(contents, whole_graph, i, alone_graph, j)
    left, right = (len([i for i in some if not _skipped(g, i)]) for g, some in ((whole_graph, span), (alone_graph, own)))
    if not count == left == right:
        raise refusal(contents, f"{_span(window.first, window.stop)} is {left} operations, standing alone {right}")


def _difference(contents: Contents, whole: Structure, i: int, alone: Structure, j: int) -> InputError:
    layer, node, other = whole.layers[i], whole.nodes[i], alone.nodes[j]
    if alone.layers[j] is None and layer is not None:
        return refusal(
            contents, f"{other.op} ({other.name}), which comes before the layers, would be applied to the hidden state again"
        )
    where = "outside the layers" if layer is None else f"in layer {layer}"
    return refusal(contents, f"{node.op} ({node.name}) {where} is built differently if the layer is computed on its own")


def _before(graph: Structure, i: int) -> bool:
    """Whether a node outside the layers comes before them."""
    first = next((j for j, layer in enumerate(graph.layers) if layer is not None), len(graph.nodes))
    return i < first or any(graph.layers[j] is not None for j in graph.readers[i])


def _in_span(graph: Structure, i: int, window: Window, *, last: bool) -> bool:
    layer = graph.layers[i]
    if layer is not None:
        return window.first <= layer < window.stop
    before = _before(graph, i)
    return before if before and window.ids is not None else last and not before


def _skipped(graph: Structure, i: int) -> bool:
    """Whether a node is a view or a copy of selected rows: it is compared only through the nodes that read it."""
    node = graph.nodes[i]
    return is_selection(node) or (node.op in VIEWS and (graph.layers[i] is None or not graph.readers[i]))


def _keys(listed: _Listed, graph: Structure, span: Sequence[int], first: int) -> Iterator[tuple[int, _Key]]:
    """Each node of a span as a key of everything that determines its value, with layers and nodes numbered from the span's start."""
    place = {i: number for number, i in enumerate(i for i in span if not _skipped(graph, i))}
    for i in place:
        node = graph.nodes[i]
        if _is_identity(node):
            yield i, ("identity",)
            continue
        sources = tuple(_source(graph, i, number, place, first) for number in range(len(node.sources)))
        yield i, (node.op, node.op_params, node.ne, sources, listed.masks[i])


def _source(graph: Structure, i: int, number: int, place: dict[int, int], first: int) -> object:
    source = graph.nodes[i].sources[number]
    at = graph.operand(i, number)
    while at is not None and is_selection(graph.nodes[at]):
        source, at = graph.nodes[at].sources[0], graph.operand(at)
    if at is None:
        if source.name in _VOCABULARY:  # cut to the rows that are read; either may replace the other
            return ("vocabulary", source.ne[0])
        return "input" if _is_hidden_state(source) else (_renumbered(source.name, first), source.ne)
    if at in place:
        return place[at]
    if graph.nodes[at].op in VIEWS:
        view = graph.nodes[at]
        return (view.op, view.op_params, view.ne, _source(graph, at, 0, place, first))
    return "input" if at in graph.inputs.values() else ("elsewhere", source.name)


def _is_hidden_state(source: OperandSource) -> bool:
    return source.op == "NONE" and source.name in ("embd", "inp_embd", "inp_embd_h")


def _is_identity(node: Node) -> bool:
    """Whether a node is a scale by 1 without a bias: some architectures apply it to a hidden state instead of the embedding's scale."""
    return node.op == "SCALE" and tuple(np.array(node.op_params[:2], np.int32).view(np.float32)) == (1.0, 0.0)


def _renumbered(name: str, first: int) -> str:
    name = _UNNAMED.sub(r"\1", name)
    return _NUMBER.sub(lambda match: str(int(match[0]) - first), name)
