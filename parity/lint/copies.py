"""One vector where there should be different ones: kept pointers, stale buffers, layers that do nothing."""

from collections import defaultdict
from collections.abc import Hashable, Iterator
from itertools import pairwise

import numpy as np

from checkpoints.dataflow import CACHE
from checkpoints.points import EMBD, in_layer, of_scores, parse
from checkpoints.record import Rows

from .inferred import follows_positions, follows_tokens, scales_the_embedding
from .rule import Hit, Place, Subject, kind, where

# Kinds of one layer whose values are the same by definition: keys at position 0 are not rotated, what is read from the
# cache is what was written, and attention over a single position gives that position's values.
_ALIKE = (
    frozenset({"q", "q_norm", "q_rope"}),
    frozenset({"k", "k_norm", "k_rope", "k_read"}),
    frozenset({"v", "v_read", "kqv_out", "attn_out"}),
)
# Saturated weights (1, 0, 0, …) are equal in any two layers and positions.
_NEVER = frozenset({"kq_soft_max"})
# The cache is read from its first row on: at every position the leading values are those of position 0.
_CACHED = frozenset({"k_read", "v_read"})
# Values of layer 0 before attention mixes positions depend only on the token.
_BEFORE_ATTENTION = frozenset({"attn_norm", "q", "k", "v", "q_norm", "k_norm"})
# With attention and feed-forward in parallel, so does the result of the first layer's feed-forward.
_BESIDE_ATTENTION = frozenset({"ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out"})
# Operations whose result depends on the position or on other positions (a shift's only on the position before).
_MIXING = frozenset({CACHE, "ROPE", "SSM_CONV", "SSM_SCAN", "GATED_DELTA_NET", "RWKV_WKV6", "RWKV_WKV7", "CPY"})
_SHIFTS = frozenset({"CONCAT"})
_OF_PARTS = frozenset({"RMS_NORM", "MUL"})  # of parts that were laid together as rows, each has its own norm
_SATURATED = 1e-7  # under it the other positions' weights add nothing to a float32 sum
_COPIES = frozenset({"CONT", "CPY", "CAST", "DUP"})


def _may_be_alike(subject: Subject, a: str, b: str) -> bool:
    first, second = parse(a), parse(b)
    layers = (subject.home(a), subject.home(b))
    if first.known is None or second.known is None:
        # Nodes outside the vocabulary have many views and copies, within a layer and from one layer to the next.
        return layers[0] is None or layers[1] is None or abs(layers[0] - layers[1]) < 2
    if layers[0] != layers[1]:
        return False
    groups = (*_ALIKE, _ALIKE[1] | _ALIKE[2]) if _one_cache(subject, first.layer) else _ALIKE
    return any({first.kind, second.kind} <= group for group in groups)


def _one_cache(subject: Subject, layer: int | None) -> bool:
    """Whether a layer's keys and values may be read from the same rows, as in latent attention."""
    if layer is None:
        return False
    if subject.model is None and subject.dataflow is None:
        return True  # for all that is known
    read = [_through_copies(subject, in_layer(layer, kind)) for kind in ("k_read", "v_read")]
    if all(read):
        return read[0] == read[1]
    return subject.model is not None and f"blk.{layer}.attn_kv_a_mqa.weight" in subject.model.model.tensors


def _through_copies(subject: Subject, name: str) -> frozenset[str]:
    """The values that a value is made from, looking through copies in another layout."""
    origin = subject.computation(name)
    reads = frozenset() if origin is None else frozenset(origin.reads)
    while (
        len(reads) == 1
        and (origin := subject.computation(next(iter(reads)))) is not None
        and origin.op in _COPIES
        and origin.reads
    ):
        reads = frozenset(origin.reads)
    return reads


def _residual(name: str) -> int | None:
    """The place of a layer's output in the chain: embd -1, blk.N.l_out N; None for other points."""
    point = parse(name)
    if name == EMBD:
        return -1
    return point.layer if point.kind == "l_out" else None


def _adjacent(names: tuple[str, ...]) -> bool:
    """Whether all of these may be the same value because one stretch of neighbouring layers adds nothing."""
    places = [_residual(name) for name in names]
    if None not in places:
        known = sorted(place for place in places if place is not None)
        return all(b - a == 1 for a, b in pairwise(known)) and len(known) == 2
    layers = {parse(name).layer for name in names}
    kinds = {kind(name) for name in names}
    return len(names) == 2 and ((kinds == {"ffn_inp", "l_out"}) and None not in layers and _span(layers) <= 1)


def _span(layers: set[int | None]) -> int:
    numbers = [layer for layer in layers if layer is not None]
    return max(numbers) - min(numbers)


def _same_sets(subject: Subject) -> dict[tuple[str, ...], list[int]]:
    """Sets of points that have the same vector at a position, with those positions."""
    seen: dict[tuple[Place, bytes], list[str]] = defaultdict(list)
    for name, places in subject.vectors.items():
        if kind(name) not in _NEVER:
            for vector in places:
                seen[vector].append(name)
    positions_of_set: dict[tuple[str, ...], list[int]] = defaultdict(list)
    unlike_of: dict[tuple[str, ...], list[str]] = {}  # the same sets recur at many positions
    origins = _origins(subject)
    for (place, _), names in seen.items():
        if len(names) == 1:
            continue
        unlike = unlike_of.get(tuple(names))
        if unlike is None:
            unlike = [
                name
                for name in names
                if any(origins[name] != origins[other] and not _may_be_alike(subject, name, other) for other in names)
            ]
            unlike_of[tuple(names)] = unlike
        if len(set(unlike)) > 1:
            positions_of_set[tuple(dict.fromkeys(unlike))].append(place[1])
    return positions_of_set


def _of_part(subject: Subject, name: str) -> str:
    """The value laid together of parts from whose first one this one's leading values are made, part by part; "" if there is none."""
    while (how := subject.computation(name)) is not None and how.op in _OF_PARTS and len(how.reads) == 1:
        name = how.reads[0]
    return name if how is not None and how.op in _SHIFTS else ""


def _origins(subject: Subject) -> dict[str, Hashable]:
    """The origin of each point: two points of equal origin have the same leading values, however far apart they are.

    Only the norm of a whole row is followed: which part of a row a view takes, or by which factor a row is scaled, is not known.
    """
    origins: dict[str, Hashable] = {}
    number_of: dict[Hashable, int] = {}
    for name, how in subject.dataflow.computations.items() if subject.dataflow is not None else ():
        reads = tuple(origins.get(read, read) for read in how.reads)
        if how.op in _SHIFTS and reads:
            origins[name] = reads[0]  # the leading values of parts side by side are those of the first part
        elif how.op == "RMS_NORM" and reads:
            origins[name] = number_of.setdefault((how.op, how.function, how.weights, reads), len(number_of))
    if subject.dataflow is None:
        origins = {name: EMBD for name in subject.points if parse(name).known is None and scales_the_embedding(subject, name)}
    return {name: origins.get(name, name) for name in subject.points}


def same_vector(subject: Subject) -> Iterator[Hit]:
    """Points far apart have the same vector."""
    for names, positions in _same_sets(subject).items():
        if not _adjacent(names):
            total = min(len(set(subject.points[name].token_idx.tolist())) for name in names)
            shown = " = ".join(names[:4]) + (f" = {len(names) - 4} more" if len(names) > 4 else "")
            yield Hit(names[0], min(positions), f"{shown} {where(positions, total)}", points=names)


def idle_layer(subject: Subject) -> Iterator[Hit]:
    """Neighbours in the chain of layers have the same vector."""
    for names, positions in _same_sets(subject).items():
        if _adjacent(names):
            total = min(len(set(subject.points[name].token_idx.tolist())) for name in names)
            evidence = f"{names[1]} = {names[0]} {where(positions, total)}: nothing was added"
            yield Hit(names[1], min(positions), evidence, points=names)


def stale_position(subject: Subject) -> Iterator[Hit]:
    """A point has the same vector at several positions whose inputs differ."""
    known, weighted = _of_their_token(subject), _weighted_by(subject)
    alone = subject.window == 1  # a position sees itself only
    for name, rows in subject.points.items():
        point = parse(name)
        if point.kind in _NEVER | _CACHED or (point.known is None and point.layer is None) or follows_positions(subject, rows):
            continue
        by_value: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        for (seq, position, _), data in subject.vectors[name]:
            by_value[seq, data].append(position)
        if name in known:
            free, shifted = known[name]
        else:
            free, shifted = _without_attention(name) or follows_tokens(subject, rows), _may_be_shifted(name)
        stale: set[int] = set()
        for (seq, _), positions in by_value.items():
            ordered = sorted(set(positions))
            for before, after in pairwise(ordered):
                same = subject.same_input(before, after)
                excused = same is not False if free else after < subject.uniform_until
                if not excused and same:  # an attention window with the same tokens gives the same value
                    excused = alone or (before > 0 and subject.same_input(before - 1, after - 1) is True)
                if shifted and not excused:
                    excused = before > 0 and subject.same_input(before - 1, after - 1) is not False
                if not excused and name in weighted:  # the first head sees the same single position at both
                    seen = weighted[name]
                    excused = (seq, before) in seen and seen[seq, before] == seen.get((seq, after))
                excused = excused or _of_same_rows(subject, name, seq, before, after)
                if not excused:
                    stale.update(ordered)
        if stale:
            total = len(set(rows.token_idx.tolist()))
            yield Hit(name, min(stale), f"{name} is the same vector {where(sorted(stale), total)}")


def _may_be_shifted(name: str) -> bool:
    """Whether a point may show the token before: a node outside the vocabulary in front of the first attention, as of a token shift."""
    point = parse(name)
    return point.layer == 0 and point.known is None


def _of_same_rows(subject: Subject, name: str, seq: int, before: int, after: int) -> bool:
    """Whether a point is made, one position at a time, from rows that are the same at both positions as a whole.

    If all heads attend to one key, attention's result is the same, and so is a product of it.
    """
    how, layer = subject.computation(name), parse(name).layer
    if how is None:
        reads = {in_layer(layer, "kqv_out")} if parse(name).kind == "attn_out" and layer is not None else set()
    else:
        reads = set() if how.op in _MIXING | _SHIFTS or of_scores(name) else set(how.reads)
    return bool(reads) and all(
        _same_rows(subject.points[read], seq, before, after)
        if read in subject.points
        else _of_same_rows(subject, read, seq, before, after)
        for read in reads
    )


def _same_rows(rows: Rows, seq: int, before: int, after: int) -> bool:
    """Whether the records of a point at two positions are whole, or have statistics, and are equal."""
    at = [np.flatnonzero((rows.seq == seq) & (rows.token_idx == position)) for position in (before, after)]
    if not all(map(len, at)):
        return False
    a, b = int(at[0][0]), int(at[1][0])
    known = rows.full()[[a, b]].all() or "l2" in rows.stats
    alike = all(stat[a] == stat[b] for stat in rows.stats.values())
    return bool(known and alike and rows.counts[a] == rows.counts[b] and np.array_equal(rows.values[a], rows.values[b]))


def _weighted_by(subject: Subject) -> dict[str, dict[tuple[int, int], int]]:
    """For each point that attention's weights make from the values, or a copy of it, whose leading values are the first head's: by
    sequence and position, the single position that this head sees, as where scores are large (T5 does not scale them).
    """
    dataflow = subject.dataflow.computations if subject.dataflow is not None else {}
    origins: dict[str, str] = {}
    for name in subject.points:
        how, layer = dataflow.get(name), parse(name).layer
        if how is None and layer is not None and parse(name).kind in ("kqv", "kqv_out"):
            origins[name] = in_layer(layer, "kq_soft_max")
        elif how is not None:
            weights = [read for read in how.reads if kind(read) == "kq_soft_max"]
            copied = [origins[read] for read in how.reads if how.op in _COPIES and read in origins]
            if origin := next(iter((*weights, *copied)), None):
                origins[name] = origin
    only = {weights: _seen_alone(subject.points[weights]) for weights in set(origins.values()) & subject.points.keys()}
    return {name: only[weights] for name, weights in origins.items() if weights in only}


def _seen_alone(rows: Rows) -> dict[tuple[int, int], int]:
    """Sequence and position of the records whose first head has the weight 1 for one position -> that position."""
    if rows.indices is not None:
        return {}
    seen: dict[tuple[int, int], int] = {}
    for r, shape in enumerate(rows.shapes):
        weights = rows.values[r, : min(int(rows.counts[r]), shape[-1] if shape else 0)]
        if weights.size and weights.max() > 1 - _SATURATED:
            seen[int(rows.seq[r]), int(rows.token_idx[r])] = int(weights.argmax())
    return seen


def _of_their_token(subject: Subject) -> dict[str, tuple[bool, bool]]:
    """For each point whose origin is known: whether its value depends only on the position's own token, and whether it may
    show the previous token's.
    """
    header = subject.dump.header
    # The leading values of parts side by side are those of the first part. In a partly rotated head they may be the unrotated ones,
    # but only llama.cpp's own dump is trusted to show that.
    parts = _SHIFTS | ({"ROPE"} if header is not None and header.source == "llama.cpp" else set())
    mixed: dict[str, bool] = {}
    mixed_before_cache: dict[str, bool] = {}
    shifts: dict[str, bool] = {}
    seen: dict[str, tuple[bool, bool]] = {}
    for name, how in subject.dataflow.computations.items() if subject.dataflow is not None else ():
        own = of_scores(name) or how.op in _MIXING or any("position" in weight for weight in how.weights)
        above = any(mixed_before_cache.get(read, False) for read in how.reads)
        shifted = any(shifts.get(read, False) for read in how.reads)
        mixed[name] = own or any(mixed.get(read, False) for read in how.reads)
        mixed_before_cache[name] = above or (own and kind(name) != "k_read")
        shifts[name] = shifted or how.op in _SHIFTS
        if how.op in parts and any(seen[part][0] if part in seen else _without_attention(part) for part in how.reads):
            seen[name] = True, True
        elif how.op in _OF_PARTS and (first := _of_part(subject, name)) in seen:
            seen[name] = seen[first]
        elif kind(name) == "kq":  # without rotation, the scores of one token's queries with the same keys are equal
            seen[name] = not above, not above and shifted
        else:
            seen[name] = not mixed[name], not mixed[name] and shifts[name]
    return seen


def _without_attention(name: str) -> bool:
    """Whether a point comes before the first attention, by its name; a node outside the vocabulary may."""
    point = parse(name)
    kinds = _BEFORE_ATTENTION | _BESIDE_ATTENTION
    return name == EMBD or (point.layer == 0 and (point.kind in kinds or point.known is None))
