"""The graphs of a loaded model: which passes are recorded, and in what they have to agree."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.graph import INPUT, STATE, VIEWS, Graph, RecordedGraph
from checkpoints.long_factors import long_above
from checkpoints.points import ENCODER
from checkpoints.rules import UNDEFINED, Recorded, explain

from ..ggml import Ggml
from ..model import Model
from ..session import Session
from .assemble import assemble, kept_leaves
from .passes import BATCH, CROSSING, PAD, PassSession, encode, output_of_encoder
from .raw import FlatPass, RawPass, flatten, same_structure, unrecordable
from .sizes import contradicted, over_a_cache, over_an_encoder, without_a_cache

_MEMORY = 1 << 28  # bytes of cache that may be used to see a window's far edge if positions cannot be moved
_FARTHEST = 16_384  # the longest window that is filled for this: the time grows with its square
_LONGEST_BATCH = 4096  # most tokens of a pass that is made to see an encoder's window
_ENCODED = (9, 6)  # rows of an encoder's output: numbers that no recorded pass of the decoder has as tokens
_FAR = 20_011  # a position from which on scales that grow with the position have begun to grow


def record(model: Model, weights: Iterable[str], *, fingerprint: str, n_ctx: int = 0) -> RecordedGraph:
    """The graphs of a loaded model.

    Args:
        weights: the names of the file's tensors.
        n_ctx: the context that a run will have: some architectures choose their RoPE factors by it.

    Raises:
        ReferenceFailed: the graph changes its structure with the length, or an input follows no rule.
    """
    names = frozenset(weights)
    facts = _facts(model)
    if model.encoder_decoder:
        return _encoder_decoder(model, names, facts, fingerprint)
    window = model.window
    context = _context(facts, window, n_ctx, 8 * model.n_layers * model.n_embd)
    # Only a pass longer than an encoder's window shows it.
    batch = BATCH
    if facts.get("attention.causal") == "false":
        batch = max(BATCH + 1, min(window + 8, _LONGEST_BATCH))
        context = max(context, batch)
    crossed = window < PAD  # by the passes over the cache's second length anyway
    with Session(model, n_ctx=context, n_batch=batch) as session:
        bench = PassSession(session, names, context)
        bench.fill(2)
        bench.settle()
        grid = [bench.take(3), bench.take(5)]
        singles = [bench.take(1)]
        bench.fill_to(PAD + 2)
        grid += [bench.take(3), bench.take(5)]
        singles.append(bench.take(1))
        proofs = [bench.take(7)]
        if batch > BATCH or not bench.caches:
            proofs.append(bench.take(batch - 1))
            crossed = batch - 1 > window
        elif not crossed and _caches(grid[0]) > 1 and bench.spread(window):
            proofs.append(bench.take(CROSSING))
            crossed = True
        elif not crossed and context > window + BATCH:
            bench.fill_to(window + 2)
            proofs.append(bench.take(6))
            crossed = True
        # A first pass sets states to zero, and is therefore another graph.
        if bench.caches and STATE not in kept_leaves(flatten(grid[0]), model.library.ggml).values():
            session.clear()
            bench.restart(_FAR)
            proofs.append(bench.take(4))
    ggml = model.library.ggml
    several, sizes, flat = _several(grid, proofs, ggml, names, facts, "a pass over several tokens")
    same = _has_one_token(several, sizes, flat, singles)
    single = None if same else _graph_of_one(singles, ggml, names, facts, several)
    # A window whose edge was not seen may be one of several kinds, which agree up to half of its length.
    longest = None if crossed else max(window // 2, 1)
    chooses_all = any(tensor.op == "TOP_K" and tensor.ne[0].cached for tensor in several.tensors)
    if chooses_all:  # the pass saw all cached positions chosen, not where the choice begins
        longest = min(longest or context, max(taken.cached for taken in (*grid, *proofs)))
    above = long_above(names, facts.get("rope.scaling.original_context_length") or facts.get("context_length"))
    return RecordedGraph(facts["general.architecture"], model.n_layers, fingerprint, several, single, longest, above)


def _encoder_decoder(model: Model, names: frozenset[str], facts: dict[str, Any], fingerprint: str) -> RecordedGraph:
    """The graphs of an encoder's pass and of the decoder's passes after it, over outputs of two lengths.

    The encoder does compute its two short inputs, so that the decoder's input can be compared with its output.
    """
    ggml = model.library.ggml
    with Session(model, n_ctx=3 * PAD, n_batch=BATCH) as session:
        encoder = PassSession(session, names, 3 * PAD, encode=True)
        grid = [encoder.take(3), encoder.take(5)]
        proofs = [encoder.take(7), encoder.take(BATCH - 1)]
        encoded, _, _ = _several(grid, proofs, ggml, names, facts, "an encoder's pass", prefix=ENCODER)
        output = output_of_encoder(session)
        decoder = PassSession(session, names, 3 * PAD)
        decoder.encoded = encode(session, output, _ENCODED[0])
        decoder.fill(2)
        decoder.settle()
        grid, singles = [decoder.take(3), decoder.take(5)], [decoder.take(1)]
        decoder.fill_to(PAD + 2)
        grid += [decoder.take(3), decoder.take(5)]
        singles.append(decoder.take(1))
        proofs = [decoder.take(7)]
        decoder.encoded = encode(session, output, _ENCODED[1])
        proofs += [decoder.take(3), decoder.take(5), decoder.take(4)]
    several, sizes, flat = _several(grid, proofs, ggml, names, facts, "a decoder's pass")
    single = None if _has_one_token(several, sizes, flat, singles) else _graph_of_one(singles, ggml, names, facts, several)
    return RecordedGraph(
        facts["general.architecture"],
        model.n_layers,
        fingerprint,
        several,
        single,
        encoder=encoded,
        start=model.decoder_start,
    )


def _facts(model: Model) -> dict[str, Any]:
    """The metadata, the architecture's own keys without its name in front."""
    metadata = model.metadata()
    prefix = metadata.get("general.architecture", "") + "."
    facts: dict[str, Any] = {key.removeprefix(prefix): _number(text) for key, text in metadata.items()}
    return facts


def _caches(taken: RawPass) -> int:
    """How many caches a pass writes to. If every layer has a window, the cache of full attention has no memory, and llama.cpp aborts
    when its positions are moved."""
    return sum(leaf.name == "attn_inp_k_idxs" for leaf in taken.leaves.values())


def _number(text: str) -> Any:
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        return text


def _context(facts: dict[str, Any], window: int, wanted: int, size: int) -> int:
    """Positions of the recording's context: enough for two lengths of cache, for the window if that fits, and on the same side as
    the run of the length at which RoPE factors change."""
    context = 3 * PAD
    if PAD <= window <= _FARTHEST and (edge := -(-(window + 2 * BATCH) // PAD) * PAD) * size <= _MEMORY:
        context = max(context, edge)
    original = facts.get("rope.scaling.original_context_length")
    if isinstance(original, int) and original > 0:
        run = -(-wanted // PAD) * PAD
        if run > original:
            context = max(context, -(-(original + 1) // PAD) * PAD)
        elif original >= 3 * PAD:
            context = min(context, original)
    return context


def _several(
    grid: Sequence[RawPass],
    proofs: Sequence[RawPass],
    ggml: Ggml,
    weights: frozenset[str],
    facts: dict[str, Any],
    subject: str,
    prefix: str = "",
) -> tuple[Graph, NDArray[np.int64], FlatPass]:
    """The graph of passes over (T1, S1), (T2, S1), (T1, S2), (T2, S2), checked by further ones; its sizes, and the first pass.

    A decoder's further passes are (…, S2) over one output of the encoder, then (T1, S2), (T2, S2), … over another. `prefix` is put
    in front of the points.
    """
    passes = (*grid, *proofs)
    flats = [flatten(taken) for taken in passes]
    same_structure(flats, subject)
    numbers = np.array([flat.numbers for flat in flats], dtype=np.int64)
    counts, cached = [len(taken.now.tokens) for taken in passes], [taken.cached for taken in passes]
    encoded = [0 if taken.now.encoded is None else len(taken.now.encoded) for taken in passes]
    places = np.array([[1, t, s, t * s, t * t, e, t * e] for t, s, e in zip(counts, cached, encoded, strict=True)]).T
    crossed = over_an_encoder(numbers, counts, encoded)
    numbers = numbers - np.moveaxis(crossed @ places, -1, 0)
    sizes = over_a_cache(numbers, counts, cached) if any(cached) else without_a_cache(numbers, counts)
    wrong = contradicted(sizes, places, numbers)
    if any(cached) and wrong.any():  # a model may have a cache and still attend to the keys of the pass only
        sizes[wrong] = without_a_cache(numbers, counts)[wrong]
        wrong = contradicted(sizes, places, numbers)
    sizes = sizes + crossed
    if wrong.any():
        raise unrecordable(flats[0].tensors[int(wrong.argmax())], f"has sizes that do not follow the length ({subject})")
    return assemble(flats, sizes, passes, ggml, weights, facts, prefix=prefix), sizes, flats[0]


def _graph_of_one(
    singles: Sequence[RawPass], ggml: Ggml, weights: frozenset[str], facts: dict[str, Any], several: Graph
) -> Graph:
    """The graph of steps over one token, with the cache filled to two lengths."""
    flats = [flatten(taken) for taken in singles]
    same_structure(flats, "a step over one token")
    a, b = (flat.numbers for flat in flats)
    cached = (b - a) // max(singles[1].cached - singles[0].cached, 1)
    zero = np.zeros_like(cached)
    sizes = np.stack([a - cached * singles[0].cached, zero, cached, zero, zero, zero, zero], axis=-1)
    return assemble(flats, sizes, singles, ggml, weights, facts, several)


def _has_one_token(several: Graph, sizes: NDArray[np.int64], flat: FlatPass, singles: Sequence[RawPass]) -> bool:
    """Whether a step over one token is the pass over several with T = 1: the same nodes, shapes and rules of inputs."""
    for taken in singles:
        flat_pass = flatten(taken)
        if len(flat_pass.tensors) != len(flat.tensors) or flat_pass.sources != flat.sources or flat_pass.roots != flat.roots:
            return False
        if any(
            a.op != b.op or (a.params != b.params and tensor.op not in VIEWS)
            for a, b, tensor in zip(flat_pass.tensors, flat.tensors, several.tensors, strict=True)
        ):
            return False
        rows = 0 if taken.now.encoded is None else len(taken.now.encoded)
        expected = sizes @ np.array([1, 1, taken.cached, taken.cached, 1, rows, rows])
        differs = expected != flat_pass.numbers
        differs[:, 4:8] = False  # the stride of a single element does not matter
        if differs.any():
            return False
        for index, tensor in enumerate(several.tensors):
            if tensor.kind == INPUT and tensor.rule is not None and tensor.rule.kind != UNDEFINED:
                raw = flat_pass.tensors[index]
                if explain([Recorded(taken.now, raw.ne, taken.data[raw.address])], {}, [tensor.rule]) != tensor.rule:
                    return False
    return True
