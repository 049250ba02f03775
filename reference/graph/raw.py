"""Tensors of a graph as llama.cpp lays them out in memory, and the recorder that copies them during a pass."""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from checkpoints.errors import ReferenceFailed
from checkpoints.rules import ForwardPass

from ..ggml import COMPUTED, Ggml

_LAYOUT = struct.Struct("<i4xQ4q4Qi16ii10QQQQ64s")  # struct ggml_tensor, as ggml.Tensor says it
INPUT_FLAG = 1  # GGML_TENSOR_FLAG_INPUT
ADVICE = "`parity dump ref` and `parity diff` accept the model."


class RawTensor(NamedTuple):
    """The fields of one `ggml_tensor`; addresses are the library's."""

    address: int
    name: str
    type: int
    ne: tuple[int, ...]
    nb: tuple[int, ...]
    op: int
    params: tuple[int, ...]
    flags: int
    sources: tuple[int, ...]
    root: int
    offset: int


class RawPass(Struct):
    """One pass as the callback saw it: its nodes in order, its leaves, and the data of the inputs."""

    now: ForwardPass
    cached: int  # S with the cache's padding
    nodes: list[RawTensor] = field(default_factory=list)
    leaves: dict[int, RawTensor] = field(default_factory=dict)
    data: dict[int, NDArray[Any]] = field(default_factory=dict)


class GraphRecorder:
    """Records one pass, node by node; `record` is called inside the callback.

    Raises (from the pass):
        ReferenceFailed: tensors have another layout, or an input has a type that cannot be read.
    """

    def __init__(self, ggml: Ggml, weights: frozenset[str], taken: RawPass) -> None:
        self._ggml, self._weights, self._taken = ggml, weights, taken
        self._known: set[int] = set()

    def record(self, address: int) -> None:
        """Record a node and the leaves that it reads."""
        raw = self._read(address)
        self._taken.nodes.append(raw)
        self._known.add(address)
        for source in (*raw.sources, raw.root):
            if source and source not in self._known:
                self._known.add(source)
                leaf = self._read(source)
                if self._ggml.op_name(leaf.op) == "NONE":
                    self._taken.leaves[source] = leaf
                    if leaf.flags & INPUT_FLAG:
                        self._taken.data[source] = self._ggml.read_raw(source)
                else:  # a view that the callback is asked about later, or never
                    self._known.discard(source)

    def _read(self, address: int) -> RawTensor:
        if not self._known:
            self._ggml.tensor(address)  # checks the layout
        fields = _LAYOUT.unpack(self._ggml.bytes_of(address, _LAYOUT.size))
        count = 10
        while count and not fields[27 + count]:
            count -= 1
        name = fields[41].split(b"\0", 1)[0].decode(errors="replace")
        return RawTensor(
            address,
            name,
            fields[0],
            fields[2:6],
            fields[6:10],
            fields[10],
            fields[11:27],
            fields[27],
            fields[28 : 28 + count],
            fields[38],
            fields[39],
        )


class FlatPass(Struct):
    """A pass with indices instead of addresses: leaves first, then nodes. `numbers` are ne, nb and offset: int64 [tensors, 9]."""

    tensors: list[RawTensor]
    leaves: int
    sources: list[tuple[int | None, ...]]
    roots: list[int | None]
    numbers: NDArray[np.int64]


def flatten(taken: RawPass) -> FlatPass:
    """The pass with indices instead of addresses, without nodes that are in the graph but not computed."""
    marked = any(node.flags & COMPUTED for node in taken.nodes)
    nodes = [node for node in taken.nodes if not marked or node.flags & COMPUTED]
    used = {source for node in nodes for source in (*node.sources, node.root)}
    leaves = [leaf for address, leaf in taken.leaves.items() if address in used]
    tensors = [*leaves, *nodes]
    index = {raw.address: i for i, raw in enumerate(tensors)}
    sources: list[tuple[int | None, ...]] = []
    for raw in tensors:
        if missing := [source for source in raw.sources if source and source not in index]:
            raise ReferenceFailed(
                f"node {raw.name!r} reads a tensor that is not in the graph ({missing[0]:#x}).", ADVICE, code="graph"
            )
        sources.append(tuple(index[source] if source else None for source in raw.sources))
    roots = [index.get(raw.root) if raw.root else None for raw in tensors]
    numbers = np.array([[*raw.ne, *raw.nb, raw.offset] for raw in tensors], dtype=np.int64)
    return FlatPass(tensors, len(leaves), sources, roots, numbers)


def unrecordable(raw: RawTensor, why: str) -> ReferenceFailed:
    """The error that names the node for which a graph cannot be recorded."""
    return ReferenceFailed(f"the graph cannot be recorded: node {raw.name!r} {why}.", ADVICE, code="graph")


def same_structure(flats: Sequence[FlatPass], subject: str) -> None:
    """Raise ReferenceFailed if passes of different lengths have different nodes or operands."""
    first = flats[0]
    for other in flats[1:]:
        if len(other.tensors) != len(first.tensors):
            raise ReferenceFailed(
                f"the graph cannot be recorded: {subject} has {len(first.tensors)} or {len(other.tensors)} tensors, by its length.",
                ADVICE,
                code="graph",
            )
        for i, (a, b) in enumerate(zip(first.tensors, other.tensors, strict=True)):
            if a.op != b.op or first.sources[i] != other.sources[i] or first.roots[i] != other.roots[i]:
                raise unrecordable(a, f"is built differently at another length ({subject})")
