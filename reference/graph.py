"""Records the graph of a model: what every node is made of, in sizes that hold for every length.

Nothing is computed: the callback declines every node, and the abort callback stops each pass at its first one. Passes of two
lengths over a cache filled to two lengths tell which sizes follow T and S; one more pass, of another length, is the proof. The
cache is filled without computing, too: a pass whose callback leaves after the first node counts as done.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import ReferenceFailed
from checkpoints.graph import CACHE, INPUT, NODE, STATE, VIEWS, WEIGHT, Graph, RecordedGraph, Rule, Size, Tensor
from checkpoints.long_factors import long_above
from checkpoints.rules import UNDEFINED, Pass, Recorded, explain

from .ggml import COMPUTED, Ggml
from .jobs import Node, Source
from .llama import Model, Session
from .naming import Signer, plan

_LAYOUT = struct.Struct("<i4xQ4q4Qi16ii10QQQQ64s")  # struct ggml_tensor, as ggml.Tensor says it
_INPUT = 1  # GGML_TENSOR_FLAG_INPUT
_FIRST = 3  # the position of the first token, so that a position is never the number of its row or cell
_PAD = 256  # llama_kv_cache::get_n_kv rounds up to it
_BATCH = 64
_BLOCK = 32  # positions that are cached at the beginning and again before a window's edge
_CROSSING = 12  # tokens of a pass across that edge
_MEMORY = 1 << 28  # bytes of cache that may be spent on seeing a window's far edge where positions cannot be moved
_FARTHEST = 16_384  # the longest window for which so many positions are filled: the time grows with its square
_LONGEST_BATCH = 4096  # tokens of a pass that is made to see an encoder's window
_FAR = 20_011  # a position behind which scales that grow with the position have begun to


class _Raw(NamedTuple):
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


@dataclass
class _Taken:
    """One pass as it was asked for: its nodes in order, its leaves, and the data of the inputs."""

    now: Pass
    cached: int  # S with the cache's padding
    nodes: list[_Raw] = field(default_factory=list)
    leaves: dict[int, _Raw] = field(default_factory=dict)
    data: dict[int, NDArray[Any]] = field(default_factory=dict)


@dataclass
class _Flat:
    """A pass with indices for addresses: leaves first, then nodes. `numbers` are ne, nb and offset: int64 [tensors, 9]."""

    tensors: list[_Raw]
    leaves: int
    sources: list[tuple[int | None, ...]]
    roots: list[int | None]
    numbers: NDArray[np.int64]


class Recorder:
    """Notes one pass, node by node; `asked` is called inside the callback.

    Raises (from the pass): ReferenceFailed: another layout of tensors, or an input of a type that cannot be read.
    """

    def __init__(self, ggml: Ggml, weights: frozenset[str], taken: _Taken) -> None:
        self._ggml, self._weights, self._taken = ggml, weights, taken
        self._known: set[int] = set()

    def asked(self, address: int) -> None:
        """Note a node and the leaves that it reads."""
        raw = self._read(address)
        self._taken.nodes.append(raw)
        self._known.add(address)
        for source in (*raw.sources, raw.root):
            if source and source not in self._known:
                self._known.add(source)
                leaf = self._read(source)
                if self._ggml.op_name(leaf.op) == "NONE":
                    self._taken.leaves[source] = leaf
                    if leaf.flags & _INPUT:
                        self._taken.data[source] = self._ggml.read_raw(source)
                else:  # a view that is asked for only later, or never
                    self._known.discard(source)

    def _read(self, address: int) -> _Raw:
        if not self._known:
            self._ggml.tensor(address)  # checks the layout
        fields = _LAYOUT.unpack(self._ggml.bytes_of(address, _LAYOUT.size))
        count = 10
        while count and not fields[27 + count]:
            count -= 1
        name = fields[41].split(b"\0", 1)[0].decode(errors="replace")
        return _Raw(
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


def record(model: Model, weights: Iterable[str], *, fingerprint: str, n_ctx: int = 0) -> RecordedGraph:
    """The graphs of a loaded model.

    Args:
        weights: the names of the file's tensors.
        n_ctx: the context that a run will have: some architectures choose their RoPE factors by it.

    Raises:
        ReferenceFailed: a graph that changes its structure with the length, or an input that follows no rule.
    """
    names = frozenset(weights)
    facts = _facts(model)
    if model.encoder_decoder:
        what = f"our engine does not have encoder–decoders ({facts['general.architecture']}): the decoder reads the encoder's output"
        raise ReferenceFailed(f"{what}.", _ADVICE, code="graph")
    window = model.window
    context = _context(facts, window, n_ctx, _bytes_a_position(model, facts))
    # An encoder's window is seen only by a pass that is longer.
    batch = _BATCH
    if facts.get("attention.causal") == "false":
        batch = max(_BATCH + 1, min(window + 8, _LONGEST_BATCH))
        context = max(context, batch)
    crossed = window < _PAD  # by the passes over the cache's second length
    with Session(model, n_ctx=context, n_batch=batch) as session:
        bench = _Bench(session, names, context)
        bench.fill(2)
        bench.settle()
        grid = [bench.take(3), bench.take(5)]
        singles = [bench.take(1)]
        bench.fill_to(_PAD + 2)
        grid += [bench.take(3), bench.take(5)]
        singles.append(bench.take(1))
        proofs = [bench.take(7)]
        if batch > _BATCH or not bench.caches:
            proofs.append(bench.take(batch - 1))
            crossed = batch - 1 > window
        elif not crossed and bench.spread(window):
            proofs.append(bench.take(_CROSSING))
            crossed = True
        elif not crossed and context > window + _BATCH:
            bench.fill_to(window + 2)
            proofs.append(bench.take(6))
            crossed = True
        # States are set to zero by a first pass, which is another graph therefore.
        if bench.caches and STATE not in _kept(_flat(grid[0], model.library.ggml), model.library.ggml).values():
            session.clear()
            bench.restart(_FAR)
            proofs.append(bench.take(4))
    ggml = model.library.ggml
    several, sizes, flat = _graph(grid, proofs, ggml, names, facts, "a pass over several tokens")
    same = _has_one_token(several, sizes, flat, singles, ggml)
    single = None if same else _graph_of_one(singles, ggml, names, facts, several)
    # A window whose edge was not seen may be one of several kinds, which agree up to half of it.
    longest = None if crossed else max(window // 2, 1)
    return RecordedGraph(
        facts["general.architecture"],
        model.n_layers,
        fingerprint,
        several,
        single,
        longest,
        long_above(names, facts.get("rope.scaling.original_context_length") or facts.get("context_length")),
    )


class _Bench:
    """A session whose passes are noted or skipped; nothing is computed in either. `caches`: whether the model keeps positions."""

    def __init__(self, session: Session, weights: frozenset[str], n_ctx: int) -> None:
        self._session, self._weights, self._n_ctx = session, weights, n_ctx
        self._origin = _FIRST
        self._next = _FIRST
        self._gap = (_FIRST, 0)  # the position before which, and how many, none are cached
        self.caches = True

    def restart(self, first: int) -> None:
        """An empty cache; the next token stands at `first`."""
        self._origin = self._next = first
        self._gap = (first, 0)

    def settle(self) -> None:
        """Take up where the sequence ends according to llama.cpp."""
        self._advance(self._next)

    def _advance(self, after: int) -> None:
        last = self._session.last_position()
        self._next = after if last is None else last + 1
        self.caches = last is not None

    def fill(self, count: int) -> None:
        """Let `count` positions count as computed."""
        self._session.skip(_ids(self._next, count, self._session.model.n_vocab), self._next)
        self._advance(self._next + count)

    def fill_to(self, cells: int) -> None:
        """Fill until so many positions are cached."""
        while self.caches and (missing := cells - (self._next - self._origin)) > 0:
            self.fill(min(missing, _BATCH))

    def spread(self, window: int) -> bool:
        """Cache the first positions and those just before `window`, none in between, so that the next pass over `_CROSSING` tokens
        crosses the edge of a window of that length, counted from the query as well as in chunks.

        The pass begins before the edge: llama.cpp puts what it adds into cells that no later position will see.

        Returns:
            False where llama.cpp cannot move what is cached (and nothing was done).
        """
        if not self.caches or not self._session.can_move_positions():
            return False
        self._session.clear()
        self.restart(_FIRST)
        self.fill(_BLOCK)
        before = self._next
        self.fill(_BLOCK)
        by = window - _CROSSING // 2 - 1 - self._next
        self._session.move_positions(before, by)
        self._gap = (before, by)
        self._next += by
        self.fill(1)  # keys are rotated anew by a graph of its own, before that of this pass
        return True

    def _keys(self, stop: int) -> NDArray[np.int64]:
        """The positions that are cached before `stop`."""
        before, by = self._gap
        positions = np.arange(self._origin, stop, dtype=np.int64)
        return positions[(positions < before) | (positions >= before + by)]

    def take(self, count: int) -> _Taken:
        """Note a pass over `count` tokens."""
        session, first = self._session, self._next
        tokens = _ids(first, count, session.model.n_vocab)
        keys = self._keys(first + count)
        if not self.caches:  # each pass stands alone
            first = self._origin = _FIRST
            keys = np.arange(first, first + count, dtype=np.int64)
        now = Pass(
            np.array(tokens, np.int64),
            np.arange(first, first + count, dtype=np.int64),
            keys,
        )
        taken = _Taken(now, min(self._n_ctx, -(-len(keys) // _PAD) * _PAD) if self.caches else 0)
        session.record(tokens, first, Recorder(session.model.library.ggml, self._weights, taken).asked)
        last = session.last_position()
        # The positions of a pass that was stopped are taken back, except from recurrent memories, which cannot.
        self._next = first if last is None else last + 1
        return taken


def _ids(first: int, count: int, n_vocab: int) -> tuple[int, ...]:
    """Ids that are neither positions nor numbers of rows."""
    return tuple((17 * (first + i) + 29) % n_vocab for i in range(count))


def _facts(model: Model) -> dict[str, Any]:
    """The metadata; those of the architecture without its name in front."""
    metadata = model.metadata()
    prefix = metadata.get("general.architecture", "") + "."
    facts: dict[str, Any] = {key.removeprefix(prefix): _number(text) for key, text in metadata.items()}
    return facts


def _number(text: str) -> Any:
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        return text


def _bytes_a_position(model: Model, facts: dict[str, Any]) -> int:
    return 8 * model.n_layers * model.n_embd


def _context(facts: dict[str, Any], window: int, wanted: int, size: int) -> int:
    """Positions of the recording's context: two lengths of cache, the window if it can be afforded, and on the run's side of the
    length at which RoPE factors change."""
    context = 3 * _PAD
    if _PAD <= window <= _FARTHEST and (edge := -(-(window + 2 * _BATCH) // _PAD) * _PAD) * size <= _MEMORY:
        context = max(context, edge)
    original = facts.get("rope.scaling.original_context_length")
    if isinstance(original, int) and original > 0:
        run = -(-wanted // _PAD) * _PAD
        if run > original:
            context = max(context, -(-(original + 1) // _PAD) * _PAD)
        elif original >= 3 * _PAD:
            context = min(context, original)
    return context


def _graph(
    grid: Sequence[_Taken], proofs: Sequence[_Taken], ggml: Ggml, weights: frozenset[str], facts: dict[str, Any], what: str
) -> tuple[Graph, NDArray[np.int64], _Flat]:
    """The graph of passes over (T1, S1), (T2, S1), (T1, S2), (T2, S2), held to further ones; its sizes, and the first of the passes."""
    passes = (*grid, *proofs)
    flats = [_flat(taken, ggml) for taken in passes]
    _same_structure(flats, what)
    numbers = np.array([flat.numbers for flat in flats], dtype=np.int64)
    counts, cached = [len(taken.now.tokens) for taken in passes], [taken.cached for taken in passes]
    places = np.array([[1, t, s, t * s, t * t] for t, s in zip(counts, cached, strict=True)]).T
    sizes = _over_a_cache(numbers, counts, cached) if any(cached) else _without_a_cache(numbers, counts)
    wrong = _contradicted(sizes, places, numbers)
    if any(cached) and wrong.any():  # a model may have a cache and attend to the keys of the pass all the same
        sizes[wrong] = _without_a_cache(numbers, counts)[wrong]
        wrong = _contradicted(sizes, places, numbers)
    if wrong.any():
        raise _odd(flats[0].tensors[int(wrong.argmax())], f"has sizes that do not follow the length ({what})")
    return _assemble(flats, sizes, passes, ggml, weights, facts), sizes, flats[0]


_Known = Sequence[tuple[str, Rule]]  # rules of inputs of that name, which one token alone may not tell apart


def _contradicted(sizes: NDArray[np.int64], places: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tensors have other numbers in a pass than these expressions give: bool [tensors]."""
    wrong: NDArray[np.bool_] = (np.moveaxis(sizes @ places, -1, 0) != numbers).any(axis=(0, 2))
    return wrong


def _over_a_cache(numbers: NDArray[np.int64], counts: Sequence[int], cached: Sequence[int]) -> NDArray[np.int64]:
    """Sizes as expressions of T and S, from passes over (T1, S1), (T2, S1), (T1, S2), (T2, S2): int64 [tensors, 9, 5]."""
    (a, b, c, d), t, s = numbers[:4], counts[0], cached[0]
    dt, ds = counts[1] - t, max(cached[2] - s, 1)
    product = (d - c - b + a) // (dt * ds)
    tokens = (b - a) // dt - product * s
    held = (c - a) // ds - product * t
    return np.stack([a - tokens * t - held * s - product * t * s, tokens, held, product, np.zeros_like(a)], axis=-1)


def _without_a_cache(numbers: NDArray[np.int64], counts: Sequence[int]) -> NDArray[np.int64]:
    """The same of an encoder, whose keys are those of the pass: from passes of three lengths, with T²."""
    (a, b), c = numbers[:2], numbers[counts.index(max(counts))]
    t, u, v = counts[0], counts[1], max(counts)
    square = ((c - a) * (u - t) - (b - a) * (v - t)) // ((v - t) * (v - u) * (u - t))
    tokens = (b - a) // (u - t) - square * (u + t)
    zero = np.zeros_like(a)
    return np.stack([a - tokens * t - square * t * t, tokens, zero, zero, square], axis=-1)


def _graph_of_one(
    singles: Sequence[_Taken], ggml: Ggml, weights: frozenset[str], facts: dict[str, Any], several: Graph
) -> Graph:
    """The graph of steps over one token, with the cache filled to two lengths."""
    flats = [_flat(taken, ggml) for taken in singles]
    _same_structure(flats, "a step over one token")
    a, b = (flat.numbers for flat in flats)
    cached = (b - a) // max(singles[1].cached - singles[0].cached, 1)
    zero = np.zeros_like(cached)
    sizes = np.stack([a - cached * singles[0].cached, zero, cached, zero, zero], axis=-1)
    return _assemble(flats, sizes, singles, ggml, weights, facts, several)


def _flat(taken: _Taken, ggml: Ggml) -> _Flat:
    """Addresses become indices; nodes that stand in the graph but are not computed are left out."""
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
                f"node {raw.name!r} reads a tensor that is not in the graph ({missing[0]:#x}).", _ADVICE, code="graph"
            )
        sources.append(tuple(index[source] if source else None for source in raw.sources))
    roots = [index.get(raw.root) if raw.root else None for raw in tensors]
    numbers = np.array([[*raw.ne, *raw.nb, raw.offset] for raw in tensors], dtype=np.int64)
    return _Flat(tensors, len(leaves), sources, roots, numbers)


_ADVICE = "`parity dump ref` and `parity diff` take the model."


def _odd(raw: _Raw, why: str) -> ReferenceFailed:
    return ReferenceFailed(f"the graph cannot be recorded: node {raw.name!r} {why}.", _ADVICE, code="graph")


def _same_structure(flats: Sequence[_Flat], what: str) -> None:
    first = flats[0]
    for other in flats[1:]:
        if len(other.tensors) != len(first.tensors):
            raise ReferenceFailed(
                f"the graph cannot be recorded: {what} has {len(first.tensors)} tensors or {len(other.tensors)}, by its length.",
                _ADVICE,
                code="graph",
            )
        for i, (a, b) in enumerate(zip(first.tensors, other.tensors, strict=True)):
            if a.op != b.op or first.sources[i] != other.sources[i] or first.roots[i] != other.roots[i]:
                raise _odd(a, f"is made in another way at another length ({what})")


def _assemble(
    flats: Sequence[_Flat],
    sizes: NDArray[np.int64],
    passes: Sequence[_Taken],
    ggml: Ggml,
    weights: frozenset[str],
    facts: dict[str, Any],
    several: Graph | None = None,
) -> Graph:
    flat = flats[0]
    names = _points(flat, ggml)
    kept = _kept(flat, ggml)
    plain = sizes.tolist()
    # What has a row for each position is seen only where there are several.
    rows = frozenset() if several is None else {tensor.point for tensor in several.tensors}
    known = () if several is None else [(tensor.name, tensor.rule) for tensor in several.tensors if tensor.rule is not None]
    tensors = []
    for i, raw in enumerate(flat.tensors):
        op = ggml.op_name(raw.op)
        kind = NODE if i >= flat.leaves else _kind(i, raw, weights, kept)
        made = [Size(*row) for row in plain[i]]
        ne = (made[0], made[1], made[2], made[3])
        point = names.points.get(i, "")
        params = raw.params if kind == NODE and op not in VIEWS else (0,) * 16
        if kind == NODE and any(other.tensors[i].params != raw.params for other in flats) and params == raw.params:
            raise _odd(raw, "has parameters that follow the length")
        tensors.append(
            Tensor(
                name=raw.name,
                kind=kind,
                op=op,
                params=params,
                type=ggml.type_name(raw.type),
                ne=ne,
                nb=(made[4], made[5], made[6], made[7]),
                sources=flat.sources[i],
                root=flat.roots[i],
                offset=made[8],
                point=point if i in names.once or (point in rows if several is not None else Size(0, 1) in ne) else "",
                operand_points=names.operands.get(i, {}),
                parts=tuple(names.parts.get(i, ())),
                rule=_rule(i, raw, flats, passes, facts, known) if kind == INPUT else None,
            )
        )
    return Graph(tuple(tensors))


def _kept(flat: _Flat, ggml: Ggml) -> dict[int, str]:
    """What is kept from pass to pass, by index: rows are set in a cache, a state is copied as a whole."""
    kinds = {"SET_ROWS": CACHE, "CPY": STATE}
    written = [(root, ggml.op_name(raw.op)) for raw, root in zip(flat.tensors, flat.roots, strict=True) if root is not None]
    return {root: kinds[op] for root, op in written if op in kinds}


def _kind(index: int, raw: _Raw, weights: frozenset[str], kept: dict[int, str]) -> str:
    if raw.flags & _INPUT:
        return INPUT
    if index in kept or raw.name.startswith("cache_"):
        return kept.get(index, CACHE)
    return WEIGHT if raw.name in weights else INPUT


def _rule(
    index: int, raw: _Raw, flats: Sequence[_Flat], passes: Sequence[_Taken], facts: dict[str, Any], known: _Known
) -> Rule | None:
    if not raw.flags & _INPUT:  # memory that nothing was written to
        return Rule(UNDEFINED)
    recorded = [
        Recorded(taken.now, flat.tensors[index].ne, taken.data[flat.tensors[index].address])
        for flat, taken in zip(flats, passes, strict=True)
    ]
    return explain(recorded, facts, [rule for name, rule in known if name == raw.name])


@dataclass
class _Names:
    """The points that stand for nodes, for operands of nodes and for parts of nodes, by index."""

    points: dict[int, str] = field(default_factory=dict)
    operands: dict[int, dict[int, str]] = field(default_factory=dict)
    parts: dict[int, list[tuple[str, int, int]]] = field(default_factory=dict)
    once: set[int] = field(default_factory=set)


def _points(flat: _Flat, ggml: Ggml) -> _Names:
    """The points that a dump of the reference has."""

    def source(raw: _Raw) -> Source:
        return Source(raw.name, ggml.op_name(raw.op), ggml.type_name(raw.type), raw.ne, raw.address)

    nodes: list[Node] = []
    for raw, sources in zip(flat.tensors[flat.leaves :], flat.sources[flat.leaves :], strict=True):
        operands = tuple(source(flat.tensors[i]) for i in sources if i is not None)
        nodes.append(
            Node(raw.name, ggml.op_name(raw.op), ggml.type_name(raw.type), raw.ne, raw.params, operands, address=raw.address)
        )
    signer = Signer()
    place = {
        signer.sign(node.name, node.op, node.sources[0].name if node.sources else ""): i + flat.leaves
        for i, node in enumerate(nodes)
    }
    names = _Names()
    for planned in plan(nodes):
        index = place[planned.signature]
        if planned.part is not None:
            names.parts.setdefault(index, []).append((planned.point, *planned.part))
        elif planned.operand is None:
            names.points[index] = planned.point
            if planned.once:
                names.once.add(index)
        else:
            names.operands.setdefault(index, {})[planned.operand] = planned.point
    return names


def _has_one_token(several: Graph, sizes: NDArray[np.int64], flat: _Flat, singles: Sequence[_Taken], ggml: Ggml) -> bool:
    """Whether a step over one token is the pass over several with T = 1: the same nodes, shapes and rules of inputs."""
    for taken in singles:
        one = _flat(taken, ggml)
        if len(one.tensors) != len(flat.tensors) or one.sources != flat.sources or one.roots != flat.roots:
            return False
        if any(
            a.op != b.op or (a.params != b.params and tensor.op not in VIEWS)
            for a, b, tensor in zip(one.tensors, flat.tensors, several.tensors, strict=True)
        ):
            return False
        expected = sizes @ np.array([1, 1, taken.cached, taken.cached, 1])
        differs = expected != one.numbers
        differs[:, 4:8] = False  # one element has no stride that matters
        if differs.any():
            return False
        for index, tensor in enumerate(several.tensors):
            if tensor.kind == INPUT and tensor.rule is not None and tensor.rule.kind != UNDEFINED:
                raw = one.tensors[index]
                if explain([Recorded(taken.now, raw.ne, taken.data[raw.address])], {}, [tensor.rule]) != tensor.rule:
                    return False
    return True
