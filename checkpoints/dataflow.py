"""What each point of a model is computed from, and by which operation: from a dump's header, or from the vocabulary."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

from msgspec import Struct

from .points import EMBD, ENCODER, KINDS, LAYER_KINDS, LOGITS, OUTPUT_NORM, apart, in_layer, lanes, order, parse

CACHE = "CACHE"  # the operation that reads attention's cache: rows that an earlier point wrote there
WITH_FUNCTION = frozenset({"UNARY", "GLU"})  # operations that are one of several functions
# Functions that ggml's CPU backend looks up in a table of float16, which rounds argument and result (ggml-cpu/vec.h).
LOOKED_UP = frozenset({"GELU", "GELU_QUICK", "GEGLU", "GEGLU_QUICK"})
_VIEWS = frozenset({"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})  # parts of a fused product
_COPIED = re.compile(r"(?:cont|cpy|dup|view|reshape|permute|transpose)(?:\.\d+)?")  # a node without a name has its operation's
_LOOKED_UP = re.compile(r"get_rows(?:\.\d+)?")
_MOST_LAYERS = 100_000  # the most that a header may claim
_MOST = 1 << 13  # points of a dataflow: 126 layers of 60 points
_MOST_NAMES = 1 << 17  # points and weights that they read, in total
_SPAN = re.compile(r"(\d{1,6})(?:\.\.(\d{1,6}))?")


def is_copy(name: str) -> bool:
    """Whether a point is a copy or a view that llama.cpp has no name for, such as "blk.0.cont.2": no other engine has such a value."""
    return _COPIED.fullmatch(parse(name).kind) is not None


class Computation(Struct, frozen=True):
    """How one point is computed: ggml's name of the operation, the points that it reads, the GGUF names of its weights.

    `function` is which one a UNARY or GLU computes ("GELU", "SWIGLU"); empty where nothing says it, as in older headers.
    """

    op: str
    reads: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    function: str = ""

    def looked_up(self, name: str) -> bool:
        """Whether ggml looks the values of this point up in a table of float16; where no function is said, whether its name says GELU."""
        return self.function in LOOKED_UP if self.function else "gelu" in name or "geglu" in name


class Dataflow(Struct, frozen=True, dict=True):
    """Points in the order of computation, each with how it is computed. A point comes after everything it reads."""

    computations: Mapping[str, Computation]

    @cached_property
    def readers(self) -> Mapping[str, tuple[str, ...]]:
        """The points that read each point, in the order of computation."""
        readers: dict[str, list[str]] = {name: [] for name in self.computations}
        for name, how in self.computations.items():
            for other in how.reads:
                readers[other].append(name)
        return {name: tuple(names) for name, names in readers.items()}

    def downstream(self, operation: Callable[[str, Computation], bool]) -> frozenset[str]:
        """The points that are made by such an operation, or from what one made."""
        downstream: set[str] = set()
        for name, how in self.computations.items():  # what a point reads stands before it
            if operation(name, how) or not downstream.isdisjoint(how.reads):
                downstream.add(name)
        return frozenset(downstream)

    def made_by_ggml(self, name: str) -> bool:
        """Whether a point is a copy without a name, or rows of a state that ggml looks up: no other engine has such values."""
        how = self.computations[name]
        of_state = not how.reads and not how.weights and _LOOKED_UP.fullmatch(parse(name).kind) is not None
        return of_state or is_copy(name)

    def part_of_next(self, name: str) -> bool:
        """Whether a point is only the first part of the computation of the next one: a product before its bias, a norm before its weight.

        Only nodes outside the vocabulary can be; so can what attention reads from its cache, which is another point's value, a copy
        without a name, and the rows of a state.
        """
        how, readers = self.computations[name], self.readers[name]
        if how.op == CACHE or (readers and self.made_by_ggml(name)):
            return True
        if (
            parse(name).known is not None
            or not readers
            or any(self.computations[reader].reads != (name,) for reader in readers)
        ):
            return False
        return len(readers) == 1 or all(self.computations[reader].op in _VIEWS for reader in readers)

    def to_json(self) -> dict[str, Any]:
        """Plain data; layers that are computed alike are given once.

        Keys are spans of layers ("0", "1..23"), and "" for points that occur once in the model. Names begin with "." for the same layer and
        "^" for the one before. An operation's function follows it: "UNARY:GELU".
        """
        layers: dict[int | None, dict[str, Any]] = {}
        for name, how in self.computations.items():
            point = parse(name)
            op = f"{how.op}:{how.function}" if how.function else how.op
            entry = [op, *([[_relative(other, point.layer) for other in names] for names in (how.reads, how.weights)])]
            layers.setdefault(point.layer, {})[point.kind] = entry
        plain: dict[str, Any] = {}
        begin: int | None = None
        numbers = sorted(layer for layer in layers if layer is not None)
        for number in numbers:
            if begin is not None and layers[number] == layers[begin] and number - 1 in layers:
                continue_from = begin
                plain.pop(_span(begin, number - 1))
                plain[_span(continue_from, number)] = layers[begin]
            else:
                begin = number
                plain[_span(number, number)] = layers[number]
        return {"": layers.get(None, {}), **plain}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Read such data back; the points are in the vocabulary's order.

        Raises:
            ValueError: the data are damaged.
        """
        origins: dict[str, Computation] = {}
        names = 0
        for span, kinds in plain.items():
            for layer in _layers(span):
                for kind, entry in kinds.items() if isinstance(kinds, dict) else [("", None)]:
                    name = kind if layer is None else in_layer(layer, kind)
                    if entry is None or not _well_formed(entry):
                        raise ValueError(f"the dataflow of {name!r} must be [operation, points, weights]")
                    op, _, function = entry[0].partition(":")
                    reads, weights = entry[1:]
                    names += len(reads) + len(weights)
                    if len(origins) >= _MOST or names > _MOST_NAMES:
                        raise ValueError(f"the dataflow has more than {_MOST:,} points or {_MOST_NAMES:,} names")
                    points, tensors = (tuple(_absolute(text, layer) for text in texts) for texts in (reads, weights))
                    origins[name] = Computation(op, points, tensors, function)
        for name, how in origins.items():
            if missing := [other for other in how.reads if other not in origins]:
                raise ValueError(f"the dataflow of {name!r} reads {missing[0]!r}, which is not in it")
        return cls(_sorted(origins))


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}..{last}"


def _layers(span: str) -> Iterable[int | None]:
    if not span:
        return (None,)
    match = _SPAN.fullmatch(span)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < _MOST_LAYERS:
        raise ValueError(f"{span!r} is not a span of layers")
    return range(first, last + 1)


def _well_formed(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str):
        return False
    return all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in entry[1:])


def _relative(name: str, layer: int | None) -> str:
    other = parse(name)
    if layer is None or other.layer is None or not 0 <= layer - other.layer <= 1:
        return name
    return f"{'.' if other.layer == layer else '^'}{other.kind}"


def _absolute(text: str, layer: int | None) -> str:
    if layer is None or text[:1] not in (".", "^"):
        return text
    return in_layer(layer - (text[0] == "^"), text[1:])


def _sorted(origins: dict[str, Computation]) -> dict[str, Computation]:
    """Sorted so that every point comes after what it reads, and by layer as far as that leaves a choice.

    Raises:
        ValueError: a point depends on itself.
    """
    placed: dict[str, Computation] = {}
    for start in sorted(origins, key=_section):
        stack = [(start, iter(origins[start].reads))]
        open_names = {start}
        while stack and start not in placed:
            name, waiting = stack[-1]
            following = next((other for other in waiting if other not in placed), None)
            if following is None:
                placed[name] = origins[name]
                stack.pop()
                open_names.discard(name)
            elif following in open_names:
                raise ValueError(f"in the dataflow {following!r} depends on itself")
            else:
                stack.append((following, iter(origins[following].reads)))
                open_names.add(following)
    return placed


def _section(name: str) -> int:
    layer = parse(name).layer
    if name.startswith(ENCODER):  # an encoder's pass comes before its decoder's
        return -2
    return -1 if layer is None and name == EMBD else (layer if layer is not None else _MOST_LAYERS)


def of_vocabulary(recorded: Sequence[str], n_layers: int | None = None) -> Dataflow:
    """The dataflow that the vocabulary implies: a point reads the last earlier point on each branch that it depends on.

    The points of each layer are those of the vocabulary, optional ones only if they were recorded, and recorded names outside it at
    their place in `recorded`. If the number of layers is unknown, the last recorded layer is taken as the last.
    """
    inside: dict[int, list[str]] = {}
    outside: list[str] = []
    for name in order([*recorded, EMBD, OUTPUT_NORM, LOGITS]):
        point = parse(name)
        if point.layer is None:
            outside.append(name)
        else:
            inside.setdefault(point.layer, []).append(point.kind)
    count = n_layers or max((layer + 1 for layer in inside), default=0)
    origins: dict[str, Computation] = {EMBD: Computation(KINDS[EMBD].op)}
    last = EMBD
    templates: dict[tuple[str, ...], dict[str, Computation]] = {}
    for layer in sorted({*range(count), *inside}):
        kinds = tuple(inside.get(layer, ()))
        for kind, how in _template(kinds, templates).items():
            reads = tuple(last if other == _INPUT else in_layer(layer, other) for other in how.reads)
            origins[in_layer(layer, kind)] = Computation(how.op, reads)
        last = next(reversed(origins))
    for name in outside:
        if name not in origins:
            origins[name] = Computation(KINDS[name].op if name in KINDS else "", (last,))
            last = name
    return Dataflow(origins)


def _template(kinds: tuple[str, ...], known: dict[tuple[str, ...], dict[str, Computation]]) -> dict[str, Computation]:
    if kinds not in known:
        known[kinds] = _layer(kinds)
    return known[kinds]


_INPUT = "-"  # the input of a layer


def _layer(recorded: tuple[str, ...]) -> dict[str, Computation]:
    """The points of one layer by their kinds."""
    wanted = [kind.name for kind in LAYER_KINDS if kind.name in recorded or not kind.optional]
    names = [parse(name).kind for name in order([in_layer(0, kind) for kind in (*recorded, *wanted)])]
    origins: dict[str, Computation] = {}
    above: dict[str, set[str]] = {_INPUT: set()}
    front = [_INPUT]
    for name in names:
        kind = KINDS.get(name)
        lane = kind.lane if kind is not None else ""
        parents = [other for other in front if not apart(_lane(other), lane)]
        direct = [other for other in parents if not any(other in above[third] for third in parents)]
        reads = dict.fromkeys([*direct, kind.adds] if kind is not None and kind.adds else direct)
        origins[name] = Computation("" if kind is None else kind.op, tuple(reads))
        above[name] = {*direct, *(further for other in direct for further in above[other])}
        # A point stays at the front as long as a branch other than this one may read it.
        front = [
            other for other in front if any(apart(lane, third) and not apart(_lane(other), third) for third in lanes())
        ] + [name]
    return origins


def _lane(kind: str) -> str:
    return KINDS[kind].lane if kind in KINDS else ""
