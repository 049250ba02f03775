"""What a graph shows regardless of names: which node reads which, and where each layer begins and ends."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

from ..jobs import Node, OperandSource
from .planned import VIEWS

NORMS = frozenset({"NORM", "RMS_NORM", "L2_NORM", "GROUP_NORM"})
WRITES = frozenset({"SET_ROWS", "CPY"})  # into a cache or a state
OUTSIDE = -1
_WEIGHTED = frozenset({"MUL_MAT", "MUL_MAT_ID", "MUL", "ADD", "ADD_ID"})
_OWN_LAYER = re.compile(r"(.+?)-(\d+)((?: \(.*)?)")
_WEIGHT = re.compile(r"(?:enc\.|dec\.)?blk\.(\d+)\.([^ ]+)(?: \(.*)?")
# Weights that a model has once. RoPE's frequency factors (rope_*) are not among them: they are read inside the layers.
_ONCE = re.compile(r"(?!blk\.|enc\.blk\.|dec\.blk\.|rope_)[\w.]+\.(?:weight|bias)(?: \(.*)?")
_OUTSIDE = re.compile(r"result_(?!embd$)|inp(?!_gate)")
_CACHE = re.compile(r"cache_\w+_l(\d+)\b.*")


def stem(name: str) -> str:
    """A node's name without its layer and without what ggml appends to views: "Kcur-0 (view)" is "Kcur"."""
    match = _OWN_LAYER.fullmatch(name)
    return match[1] if match else name.partition(" (")[0]


def is_selection(node: Node) -> bool:
    """Whether a node copies the rows whose logits were asked for: values that exist elsewhere already."""
    return node.op == "GET_ROWS" and any(source.name in ("out_ids", "inp_out_ids") for source in node.sources)


class Structure:
    """A graph's nodes with their operands as indices, and the layer that each belongs to.

    Attributes:
        nodes: in the order of computation.
        sources: for each node the indices of its operands, None for a leaf.
        layers: for each node its layer, None outside the layers.
        inputs: for each layer the node that enters it (the previous layer's output or the embedding), if the graph shows it.
        outputs: for each layer the node that leaves it, if the graph shows it.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.sources = list(_sources(nodes))
        repeated = _repeated(nodes)
        self._stated = [_stated_layer(node, repeated) for node in nodes]
        self._settle_norms()
        if repeated:
            self._settle_after_layers()
        numbers = sorted({layer for layer in self._stated if layer is not None and layer != OUTSIDE})
        self.inputs = {layer: entering for layer in numbers if (entering := self._entering(layer)) is not None}
        self.layers = self._spread(numbers[-1] if numbers else -1)
        self.outputs = {number: self.inputs[after] for number, after in pairwise(numbers) if after in self.inputs}
        # What the next layer reads first may be made of earlier values (a mixture of all), or come between two times of a layer.
        named = {number: i for i, number in enumerate(self.layers) if number is not None and nodes[i].name == f"l_out-{number}"}
        self.outputs |= {number: i for number, i in named.items() if repeated or self.outputs.get(number, i) < i}
        if numbers and (last := self._leaving(numbers[-1])) is not None:
            self.outputs[numbers[-1]] = last

    @cached_property
    def readers(self) -> list[list[int]]:
        """For each node the nodes that read it, directly or through views; views themselves are left out."""
        readers_of: list[list[int]] = [[] for _ in self.nodes]
        for i in reversed(range(len(self.nodes))):
            for source in self.sources[i]:
                if source is not None:
                    readers_of[source] += readers_of[i] if self.nodes[i].op in VIEWS else [i]
        return [sorted(set(readers)) for readers in readers_of]

    def operand(self, i: int, number: int = 0) -> int | None:
        """One of a node's operands; None if it is a leaf or there is none."""
        sources = self.sources[i]
        return sources[number] if number < len(sources) else None

    def base(self, i: int) -> int:
        """The node whose value a view shows; a view of a leaf is its own base."""
        while self.nodes[i].op in VIEWS and (source := self.operand(i)) is not None:
            i = source
        return i

    def leaf(self, i: int) -> str:
        """The name of the leaf that a view shows; "" if it shows a node."""
        i = self.base(i)
        if self.nodes[i].op in VIEWS and self.nodes[i].sources:
            return self.nodes[i].sources[0].name
        return ""

    def upstream(self, i: int) -> Iterator[int]:
        """The node and everything in its layer that it is computed from."""
        layer, entrances = self.layers[i], self._entrances
        waiting, seen = [i], {i}
        while waiting:
            at = waiting.pop()
            yield at
            for source in self.sources[at]:
                if source is not None and source not in seen and self.layers[source] == layer and source not in entrances:
                    seen.add(source)
                    waiting.append(source)

    @cached_property
    def _entrances(self) -> frozenset[int]:
        return frozenset(self.inputs.values())

    def weight(self, i: int) -> str:
        """The weight that a node reads, without its layer ("attn_q.weight"); "" if it reads none."""
        for source in self.nodes[i].sources:
            if match := _WEIGHT.fullmatch(source.name):
                return match[2]
        return ""

    def _settle_norms(self) -> None:
        """Put each norm in the layer of its weight: llama.cpp calls the embedding's norm `norm-0`, and many others `norm`."""
        for i in reversed(range(len(self.nodes))):
            if self.nodes[i].op in NORMS:
                places = {self._stated[j] for j in self.readers[i]}
                if len(places) == 1 and None not in places:
                    self._stated[i] = places.pop()

    def _settle_after_layers(self) -> None:
        """Put a value that is named after an earlier layer than that of what it reads into the later one.

        hrm-text's `stack_norm-0` ends the stack of layers that begins with layer 0.
        """
        reached: list[int] = []
        for i, stated in enumerate(self._stated):
            latest = max((reached[source] for source in self.sources[i] if source is not None), default=OUTSIDE)
            if stated is not None and OUTSIDE != stated < latest:
                self._stated[i] = latest
            reached.append(max(latest, OUTSIDE if stated is None else stated))

    def _entering(self, layer: int) -> int | None:
        """The node outside this layer that the layer's first nodes read."""
        for i, stated in enumerate(self._stated):
            if stated != layer or self.nodes[i].op in VIEWS:
                continue
            if self._reads_hidden_state(i):
                return None
            operands = [self.base(source) for source in self.sources[i] if source is not None]
            if self.nodes[i].op == "ADD" and len(operands) > 1 and all(self._stated[at] != layer for at in operands):
                self._stated[i] = layer - 1  # the sum that ends a layer is named after the beginning of the next one
                return i
            for at in operands:
                if self.nodes[at].op not in VIEWS and self._stated[at] != layer and not self._reads_leaves(at):
                    return at
        return None

    def _reads_hidden_state(self, i: int) -> bool:
        """Whether a norm or a product reads a leaf, as it does if a hidden state is given instead of tokens."""
        if self.nodes[i].op in NORMS:
            return self.operand(i) is None
        return self.nodes[i].op == "MUL_MAT" and bool(self.weight(i)) and self.operand(i, 1) is None

    def _reads_leaves(self, i: int) -> bool:
        """Whether a node only fetches the contents of a leaf, such as a sequence's state; the embedding is not such a node."""
        return self._stated[i] is None and all(source is None or self.leaf(source) for source in self.sources[i])

    def _leaving(self, layer: int) -> int | None:
        inside = [i for i, number in enumerate(self.layers) if number == layer and self.nodes[i].op not in VIEWS | WRITES]
        crossing = [i for i in inside if any(self.layers[j] is None for j in self.readers[i])]
        named = [i for i in crossing if self.nodes[i].name == f"l_out-{layer}"]
        leaving = named or crossing or inside
        return leaving[-1] if leaving else None

    def _spread(self, last: int) -> list[int | None]:
        """The layers of all nodes: the stated one, else the layer that its operands enter, else theirs."""
        entering = {node: layer for layer, node in self.inputs.items()}
        after = last + 1
        layers: list[int | None] = []
        reached: list[int] = []  # for each node the layer of its readers: -1 before all layers, `after` after them
        for i, node in enumerate(self.nodes):
            layer = self._stated[i]
            operands = max((reached[source] for source in self.sources[i] if source is not None), default=OUTSIDE)
            if layer is None:
                layer = operands
            elif layer == OUTSIDE and operands == after:
                layer = after
            layers.append(layer if 0 <= layer < after else None)
            if node.op in VIEWS and operands != OUTSIDE:
                reached.append(operands)
            else:
                reached.append(entering.get(i, layer + 1 if node.name == f"l_out-{layer}" else layer))
        return layers


def _sources(nodes: Sequence[Node]) -> Iterator[list[int | None]]:
    """Each node's operands: found by address if it is known, else the latest earlier node of that name, operation and shape."""
    known: dict[tuple[object, ...], int] = {}
    for i, node in enumerate(nodes):
        yield [known.get(_key(source)) for source in node.sources]
        known[_key(node)] = i


def _key(tensor: Node | OperandSource) -> tuple[object, ...]:
    return (tensor.address,) if tensor.address else (tensor.name, tensor.op, tensor.ne)


def _repeated(nodes: Sequence[Node]) -> frozenset[str]:
    """The weights that several layers read, by the readers' own names, as where a model goes through its blocks several times.

    Each time is a layer with a cache of its own there (hrm-text, nanbeige), and the weights are those of the first time.
    """
    places: dict[str, set[str]] = {}
    for node in nodes:
        if node.op in _WEIGHTED and not re.match(r"node_\d", node.name):
            own = _OWN_LAYER.fullmatch(node.name)
            for source in node.sources:
                if _WEIGHT.fullmatch(source.name) or _ONCE.fullmatch(source.name):
                    places.setdefault(source.name, set()).add(own[2] if own else "")
    return frozenset(weight for weight, numbers in places.items() if len(numbers) > 1)


def _stated_layer(node: Node, repeated: frozenset[str]) -> int | None:
    """The layer that a node's weight, name or cache states: OUTSIDE if they state that it has none, None if they state nothing.

    A weight in `repeated` states none.
    """
    for source in node.sources:
        if (match := _WEIGHT.fullmatch(source.name)) and source.name not in repeated:
            return int(match[1])
    if any(_ONCE.fullmatch(source.name) and source.name not in repeated for source in node.sources) or _OUTSIDE.match(
        node.name
    ):
        return OUTSIDE
    match = _OWN_LAYER.fullmatch(node.name)
    if match and (node.op in VIEWS or not match[3]):  # a copy of a view keeps the name of the original
        return int(match[2])
    for source in node.sources:
        if match := _CACHE.fullmatch(source.name):
            return int(match[1])
    return None
