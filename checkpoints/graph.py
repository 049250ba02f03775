"""The graph that llama.cpp computes for a model, as data: what every node is computed from, by which operation, in which shape.

A recording holds for every length: sizes, strides and offsets are expressions in T, the tokens of a pass, S, the
positions that the cache holds after it, and, for a decoder that reads an encoder's output, E, the rows of that output. It can be
stored beside a dump and is read without llama.cpp.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self

from msgspec import Struct, field
from msgspec.structs import replace

from .errors import DumpError

FORMAT = 1
WEIGHT, INPUT, CACHE, STATE, NODE = "weight", "input", "cache", "state", "node"
VIEWS = frozenset({"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})


class Size(NamedTuple):
    """fixed + tokens · T + cached · S + product · T · S + square · T² + encoded · E + crossed · T · E."""

    fixed: int
    tokens: int = 0
    cached: int = 0
    product: int = 0
    square: int = 0
    encoded: int = 0
    crossed: int = 0

    def at(self, t: int, s: int, e: int = 0) -> int:
        """Its value in a pass of t tokens that leaves s positions in the cache and reads e rows of an encoder's output."""
        known = self.fixed + self.tokens * t + self.cached * s + self.product * t * s + self.square * t * t
        return known + (self.encoded + self.crossed * t) * e

    @property
    def constant(self) -> bool:
        """Whether it is the same in every pass."""
        return not any(self[1:])

    def divided(self, by: int) -> "Size":
        """The same, divided by `by`.

        Raises:
            ValueError: it is not a multiple.
        """
        if any(number % by for number in self):
            raise ValueError(f"{self} is not a multiple of {by}")
        return Size(*(number // by for number in self))


class MovingParam(NamedTuple):
    """A parameter of a node that depends on the length of the pass: `op_params[number]`, a whole number or, if `real`, a float32."""

    number: int
    size: Size
    real: bool


Sizes = tuple[Size, Size, Size, Size]
NOTHING = Size(0)


class InputRule(Struct, frozen=True):
    """How an input follows from tokens and positions; `kind` is one of `checkpoints.rules.RULES`, checked on the recorded data."""

    kind: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


class Tensor(Struct, frozen=True):
    """A node of the graph or one of its leaves.

    Attributes:
        kind: "node", or for a leaf "weight" (its name is the GGUF's), "input", "cache" (keys or values), "state" (recurrent).
        op: ggml's name of the operation ("MUL_MAT"), "NONE" for a leaf.
        params: the 16 int32 of `op_params` (a float is the same 32 bits); zeros for a view: its place is in `root` and `offset`.
        moving: those of `params` that depend on the length; there they are of one of the recorded passes.
        type: ggml's name of the type ("f32").
        ne: elements in each of four dimensions, the fastest first.
        nb: bytes from one element to the next, likewise.
        sources: the operands, as indices into the graph's tensors; None if ggml leaves an operand out.
        root: the tensor whose memory this one shows, None if it has its own; `offset` bytes into it.
        point: the name of the value in the vocabulary of points, "" if it has none.
        operand_points: names of operands (by number) that are points themselves, as k_read and v_read are.
        parts: points that are part of its rows: name, and first and last + 1 element of the innermost dimension.
        rule: for an input, how it is made.
    """

    name: str
    kind: str
    op: str
    params: tuple[int, ...]
    type: str
    ne: Sizes
    nb: Sizes
    sources: tuple[int | None, ...] = ()
    root: int | None = None
    offset: Size = NOTHING
    point: str = ""
    operand_points: Mapping[int, str] = field(default_factory=dict)
    parts: tuple[tuple[str, int, int], ...] = ()
    rule: InputRule | None = None
    moving: tuple[MovingParam, ...] = ()

    @property
    def position_axis(self) -> int | None:
        """The dimension of `ne` that counts the tokens of the pass, None if there is not exactly one."""
        axes = [axis for axis, size in enumerate(self.ne) if size.tokens or size.product or size.square or size.crossed]
        return axes[0] if len(axes) == 1 and self.ne[axes[0]] == Size(0, 1) else None


class Graph(Struct, frozen=True, dict=True):
    """The graph of one kind of pass: leaves and nodes, the nodes in the order of computation."""

    tensors: tuple[Tensor, ...]

    @cached_property
    def consumers(self) -> Mapping[int, tuple[int, ...]]:
        """Which tensors read each tensor, by index."""
        by_source: dict[int, list[int]] = {}
        for index, tensor in enumerate(self.tensors):
            for source in tensor.sources:
                if source is not None:
                    by_source.setdefault(source, []).append(index)
        return {source: tuple(dict.fromkeys(readers)) for source, readers in by_source.items()}

    def root_of(self, index: int) -> int:
        """The tensor that owns the memory shown by this one."""
        root = self.tensors[index].root
        return index if root is None else root


class RecordedGraph(Struct, frozen=True):
    """The graphs of a model: for a pass over several tokens, and for one token if that graph is built differently.

    Attributes:
        fingerprint: that of the model file.
        longest: the number of positions up to which the rules of its inputs were checked; None if they hold for any number.
        long_above: the context (a run's positions, padded as llama.cpp does) above which RoPE uses its long factors instead of its short
            ones; None if it has only one kind.
        encoder: for an encoder–decoder, the graph of the encoder's pass; the others are the decoder's, which begins with token `start`.
    """

    architecture: str
    n_layers: int
    fingerprint: str
    several: Graph
    single: Graph | None = None
    longest: int | None = None
    long_above: int | None = None
    encoder: Graph | None = None
    start: int | None = None

    def of(self, tokens: int) -> Graph:
        """The graph of a pass over so many tokens."""
        return self.single if tokens == 1 and self.single is not None else self.several

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "format": FORMAT,
            "architecture": self.architecture,
            "n_layers": self.n_layers,
            "fingerprint": self.fingerprint,
            "longest": self.longest,
            "long_above": self.long_above,
            "several": [_plain(tensor) for tensor in self.several.tensors],
            "single": None if self.single is None else [_plain(tensor) for tensor in self.single.tensors],
            "encoder": None if self.encoder is None else [_plain(tensor) for tensor in self.encoder.tensors],
            "start": self.start,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a recording back from such data.

        Raises:
            DumpError: the data are damaged, or of another format.
        """
        try:
            if data["format"] != FORMAT:
                raise DumpError(
                    f"the recorded graph has format {data['format']!r}, this version reads {FORMAT}.", "Record it again."
                )
            single = None if data["single"] is None else _graph(data["single"])
            longest, above, start = (
                None if data.get(name) is None else int(data[name]) for name in ("longest", "long_above", "start")
            )
            encoder = None if data.get("encoder") is None else _graph(data["encoder"])
            return cls(
                str(data["architecture"]),
                int(data["n_layers"]),
                str(data["fingerprint"]),
                _graph(data["several"]),
                single,
                longest,
                above,
                encoder,
                start,
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DumpError(f"the recorded graph is damaged ({error}).", "Record it again.", code="graph") from error


def _plain(tensor: Tensor) -> dict[str, Any]:
    """A tensor as plain data without fields that have their default: a graph has thousands of tensors."""
    plain: dict[str, Any] = {
        "name": tensor.name,
        "op": tensor.op,
        "type": tensor.type,
        "ne": _sizes(tensor.ne),
        "nb": _sizes(tensor.nb),
    }
    if tensor.kind != NODE:
        plain["kind"] = tensor.kind
    if any(tensor.params):
        plain["params"] = list(tensor.params)
    if tensor.moving:
        plain["moving"] = [[number, _size(size), real] for number, size, real in tensor.moving]
    if tensor.sources:
        plain["sources"] = list(tensor.sources)
    if tensor.root is not None:
        plain |= {"root": tensor.root, "offset": _size(tensor.offset)}
    if tensor.point:
        plain["point"] = tensor.point
    if tensor.operand_points:
        plain["operand_points"] = {str(number): name for number, name in tensor.operand_points.items()}
    if tensor.parts:
        plain["parts"] = [list(part) for part in tensor.parts]
    if tensor.rule is not None:
        plain["rule"] = {"kind": tensor.rule.kind, **tensor.rule.parameters}
    return plain


def _size(size: Size) -> int | list[int]:
    return size.fixed if size.constant else list(size)


def _sizes(sizes: Sequence[Size]) -> list[int | list[int]]:
    return [_size(size) for size in sizes]


def _graph(plain: Sequence[Mapping[str, Any]]) -> Graph:
    tensors = tuple(_tensor(entry, len(plain)) for entry in plain)
    return Graph(tensors)


def _tensor(plain: Mapping[str, Any], count: int) -> Tensor:
    sources = tuple(None if source is None else int(source) for source in plain.get("sources", ()))
    root = plain.get("root")
    if any(index is not None and not 0 <= index < count for index in (*sources, root)):
        raise ValueError(f"{plain['name']!r} reads a tensor that is not there")
    rule = plain.get("rule")
    return Tensor(
        name=str(plain["name"]),
        kind=str(plain.get("kind", NODE)),
        op=str(plain["op"]),
        params=tuple(int(number) for number in plain.get("params", (0,) * 16)),
        type=str(plain["type"]),
        ne=_read_sizes(plain["ne"]),
        nb=_read_sizes(plain["nb"]),
        sources=sources,
        root=root,
        offset=_read_size(plain.get("offset", 0)),
        point=str(plain.get("point", "")),
        operand_points={int(number): str(name) for number, name in plain.get("operand_points", {}).items()},
        parts=tuple((str(name), int(start), int(stop)) for name, start, stop in plain.get("parts", ())),
        rule=None if rule is None else InputRule(rule["kind"], {key: value for key, value in rule.items() if key != "kind"}),
        moving=tuple(MovingParam(int(number), _read_size(size), bool(real)) for number, size, real in plain.get("moving", ())),
    )


def _read_size(plain: int | Sequence[int]) -> Size:
    return Size(plain) if isinstance(plain, int) else Size(*(int(number) for number in plain))


def _read_sizes(plain: Sequence[int | Sequence[int]]) -> Sizes:
    first, second, third, fourth = (_read_size(entry) for entry in plain)
    return first, second, third, fourth


def renamed(graph: Graph, points: Mapping[int, str]) -> Graph:
    """The same graph with other points, by tensor index."""
    return Graph(tuple(replace(tensor, point=points.get(i, tensor.point)) for i, tensor in enumerate(graph.tensors)))
