"""The same vector where two different ones belong: kept pointers, stale buffers, layers that do nothing."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from checkpoints.dataflow import CACHE
from checkpoints.points import EMBD, in_layer, of_scores, parse

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
# What layer 0 makes before attention mixes positions depends on the token alone.
_BEFORE_ATTENTION = frozenset({"attn_norm", "q", "k", "v", "q_norm", "k_norm"})
# Where attention and feed-forward stand side by side, so does what the first layer's feed-forward makes.
_BESIDE_ATTENTION = frozenset({"ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out"})
# Operations whose result depends on the position or on other positions; of a shift, on the position before alone.
_MIXING = frozenset({CACHE, "ROPE", "SSM_CONV", "SSM_SCAN", "GATED_DELTA_NET", "RWKV_WKV6", "RWKV_WKV7", "CPY"})
_SHIFTS = frozenset({"CONCAT"})
_COPIES = frozenset({"CONT", "CPY", "CAST", "DUP"})


def _may_be_alike(subject: Subject, a: str, b: str) -> bool:
    first, second = parse(a), parse(b)
    layers = (subject.home(a), subject.home(b))
    if first.known is None or second.known is None:
        # Views and copies of nodes outside the vocabulary are many, within a layer and from one to the next.
        return layers[0] is None or layers[1] is None or abs(layers[0] - layers[1]) < 2
    if layers[0] != layers[1]:
        return False
    groups = (*_ALIKE, _ALIKE[1] | _ALIKE[2]) if _one_cache(subject, first.layer) else _ALIKE
    return any({first.kind, second.kind} <= group for group in groups)


def _one_cache(subject: Subject, layer: int | None) -> bool:
    """Whether a layer's keys and values are read from the same rows, as in latent attention."""
    if layer is None:
        return False
    read = [_behind_copies(subject, in_layer(layer, kind)) for kind in ("k_read", "v_read")]
    if all(read):
        return read[0] == read[1]
    return subject.model is not None and f"blk.{layer}.attn_kv_a_mqa.weight" in subject.model.model.tensors


def _behind_copies(subject: Subject, name: str) -> frozenset[str]:
    """What a value is made from, through copies in another layout."""
    origin = subject.made(name)
    reads = frozenset() if origin is None else frozenset(origin.reads)
    while len(reads) == 1 and (origin := subject.made(next(iter(reads)))) is not None and origin.op in _COPIES and origin.reads:
        reads = frozenset(origin.reads)
    return reads


def _residual(name: str) -> int | None:
    """The place of a layer's output in the chain: embd -1, blk.N.l_out N; None for other points."""
    point = parse(name)
    if name == EMBD:
        return -1
    return point.layer if point.kind == "l_out" else None


def _adjacent(names: tuple[str, ...]) -> bool:
    """Whether all of these may be one value because a single stretch of neighbouring layers adds nothing."""
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
    """Sets of points that hold one vector at a position, with those positions."""
    seen: dict[tuple[Place, bytes], list[str]] = defaultdict(list)
    for name, places in subject.vectors.items():
        if kind(name) not in _NEVER:
            for vector in places:
                seen[vector].append(name)
    positions_of_set: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for (place, _), names in seen.items():
        if len(names) == 1:  # nearly all of them
            continue
        unlike = [name for name in names if any(not _may_be_alike(subject, name, other) for other in names if other != name)]
        if len(set(unlike)) > 1:
            positions_of_set[tuple(dict.fromkeys(unlike))].append(place[1])
    return positions_of_set


def same_vector(subject: Subject) -> Iterator[Hit]:
    """Points far apart that hold one vector."""
    for names, positions in _same_sets(subject).items():
        if not _adjacent(names):
            total = min(len(set(subject.points[name].token_idx.tolist())) for name in names)
            shown = " = ".join(names[:4]) + (f" = {len(names) - 4} more" if len(names) > 4 else "")
            yield Hit(names[0], min(positions), f"{shown} {where(positions, total)}")


def idle_layer(subject: Subject) -> Iterator[Hit]:
    """Neighbours in the chain of layers that hold one vector."""
    for names, positions in _same_sets(subject).items():
        if _adjacent(names):
            total = min(len(set(subject.points[name].token_idx.tolist())) for name in names)
            yield Hit(names[1], min(positions), f"{names[1]} = {names[0]} {where(positions, total)}: nothing was added")


def stale_position(subject: Subject) -> Iterator[Hit]:
    """One point that holds the same vector at several positions whose inputs differ."""
    for name, rows in subject.points.items():
        point = parse(name)
        if point.kind in _NEVER | _CACHED or (point.known is None and point.layer is None):
            continue
        by_value: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        for (seq, position, _), data in subject.vectors[name]:
            by_value[seq, data].append(position)
        free, shifted = _of_its_token(subject, name)
        stale: set[int] = set()
        for positions in by_value.values():
            ordered = sorted(set(positions))
            for before, after in pairwise(ordered):
                same = subject.same_input(before, after)
                excused = same is not False if free else after < subject.uniform_until
                if shifted and not excused:
                    excused = before > 0 and subject.same_input(before - 1, after - 1) is not False
                if not excused:
                    stale.update((before, after))
        if stale:
            total = len(set(rows.token_idx.tolist()))
            yield Hit(name, min(stale), f"{name} is the same vector {where(sorted(stale), total)}")


def _of_its_token(subject: Subject, name: str) -> tuple[bool, bool]:
    """(whether a value depends on nothing but the position's own token, whether it may be the one before that it shows)."""
    point = parse(name)
    if name in subject.above:
        own = subject.made(name)
        # The leading values of parts side by side are those of the first part.
        # Of a head that is rotated in part they may be those that stay, which only llama.cpp's own dump is believed to show.
        header = subject.dump.header
        parts = _SHIFTS | ({"ROPE"} if header is not None and header.source == "llama.cpp" else set())
        if own is not None and own.op in parts and any(_of_its_token(subject, part)[0] for part in own.reads):
            return True, True
        # Scores of one token's queries with the same keys are the same, where nothing is rotated.
        above = subject.above[name] - ({name, in_layer(point.layer or 0, "k_read")} if point.kind == "kq" else set())
        origins = [how for other in above if (how := subject.made(other)) is not None]
        alone = not any(of_scores(other) for other in above) and not any(
            how.op in _MIXING or any("position" in weight for weight in how.weights) for how in origins
        )
        shifted = any(how.op in _SHIFTS for how in origins)
        return alone, alone and shifted
    # A node outside the vocabulary may stand before the attention, too.
    kinds = _BEFORE_ATTENTION | _BESIDE_ATTENTION
    return name == EMBD or (point.layer == 0 and (point.kind in kinds or point.known is None)), False
