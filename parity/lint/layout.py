"""Rules on numbers of values, shapes, positions and the file's end."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import product
from math import prod

import numpy as np

from checkpoints.answers.lint import WARNING
from checkpoints.points import LOGITS, OUTPUT_NORM, parse
from checkpoints.record import Rows
from checkpoints.repeated import same_values
from reports.numbers import ranges

from .model_facts import ModelFacts
from .rule import Hit, Subject, positions_of


def value_count(subject: Subject) -> Iterator[Hit]:
    """Fewer values than the slice and the shape promise."""
    header = subject.dump.header
    if not subject.points:
        return
    counts, often = np.unique(np.concatenate([rows.counts for rows in subject.points.values()]), return_counts=True)
    if not len(counts):
        return
    # Without a header the slice is as long as in most records.
    usual = header.slice if header is not None else int(counts[often.argmax()])
    for name, rows in subject.points.items():
        fewer = np.flatnonzero((rows.counts < usual) & ~rows.full()).tolist()
        short = [r for r in fewer if header or rows.shapes[r]]
        if short and rows.indices is None:
            r = short[0]
            shape = f" of {list(rows.shapes[r])}" if rows.shapes[r] else ""
            evidence = f"{name} has {int(rows.counts[r])} values{shape}, the slice is {usual}, {positions_of(rows, short)}"
            yield Hit(name, int(rows.token_idx[r]), evidence)


def _wanted(model: ModelFacts, name: str) -> dict[str, set[int]]:
    """The sizes that each letter of the vocabulary may have in a point's layer, by the layer's own tensors if it has them."""
    hp, point = model.hp, parse(name)
    size = hp.value_size if point.kind in ("v", "v_read", "kqv_out") else hp.head_size
    wanted = {"D": {hp.n_embd}, "V": {hp.n_vocab}, "F": {hp.n_ff}, "H": {hp.n_heads}}
    wanted |= {"H*d": {hp.n_heads * size}, "K*d": {hp.n_kv_heads * size}}
    if model.alike or point.layer is None:
        return wanted
    # If layers differ in heads and widths, only the matrices of this layer are certain.
    rows = {
        kind: model.rows(f"blk.{point.layer}.{kind}.weight") for kind in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    }
    forward = {rows["ffn_up"]} if rows["ffn_gate"] else {rows["ffn_up"], rows["ffn_up"] // 2}
    heads = {"attn_q": rows["attn_q"] if point.kind == "q" else 0, "attn_k": rows["attn_k"], "attn_v": rows["attn_v"]}
    letter = "attn_v" if point.kind == "v" else "attn_k" if point.kind == "k" else "attn_q" if point.kind == "q" else ""
    known = heads.get(letter, 0)
    return {
        "D": {hp.n_embd},
        "V": {hp.n_vocab},
        "F": forward if rows["ffn_up"] else set(),
        "H": set(),
        "H*d": {known, known // 2} if known else set(),  # a gate of attention may be part of the queries' product
        "K*d": {known} if known else set(),
    }


def shape(subject: Subject) -> Iterator[Hit]:
    """A row's shape contradicts the model, or the dump's other points."""
    if subject.model is None:
        yield from _shapes_disagree(subject)
        return
    hp = subject.model.hp
    for name, rows in subject.points.items():
        point = parse(name)
        if point.layer is not None and point.layer >= hp.n_layers:
            yield Hit(name, None, f"{name}: the model has layers 0 to {hp.n_layers - 1}")
            continue
        if point.known is None:
            continue
        if _streams(subject, name):
            continue
        letters = _wanted(subject.model, name)
        if any(not letters.get(letter, {1}) for letter in point.known.row):
            continue
        for wrong, members in _by_shape(rows).items():
            first = members[0]
            seen = {int(rows.token_idx[first]) + 1, *(() if subject.model.alike else (len(rows),))}
            choices = list(product(*(sorted(letters.get(letter, seen)) for letter in point.known.row)))
            if any(prod(wrong) == prod(choice) for choice in choices):
                continue
            wanted = list(choices[0])
            if "t+1" in point.known.row and _later_start(wrong, wanted, rows):
                continue
            per_row = wrong[-1] == wanted[-1] and len(wanted) == 1
            evidence = f"{name} says shape {list(wrong)}, the model's row is {wanted}, {positions_of(rows, members)}"
            if per_row:
                evidence += ": that is a whole pass, but a record is one position's row"
            yield Hit(name, int(rows.token_idx[first]), evidence, WARNING if per_row else None)


def _streams(subject: Subject, name: str) -> bool:
    """Whether a value consists of several streams side by side: joined, made by an AltUp projection, or hyper-connected."""
    if parse(name).kind != "l_out":
        return False
    origin = subject.computation(name)
    while origin is not None and origin.op == "CPY" and origin.reads:
        origin = subject.computation(origin.reads[0])
    side_by_side = subject.model is not None and subject.model.several_streams
    return side_by_side or (origin is not None and origin.op in ("CONCAT", "DSV4_HC_POST"))


def _outputs_of_several_streams(subject: Subject) -> bool:
    """Whether all layers' outputs are one whole multiple of the width of everything else, which is not the number of positions: a pass
    that was written as one row is.
    """
    lengths: dict[bool, set[int]] = {True: set(), False: set()}
    for name, rows in subject.points.items():
        point = parse(name)
        if point.known is not None and point.known.row == ("D",):
            lengths[point.kind == "l_out"].update(prod(shape) for shape in rows.shapes if shape)
    if not all(len(seen) == 1 for seen in lengths.values()):
        return False
    (outputs,), (width,) = lengths[True], lengths[False]
    streams, rest = divmod(outputs, width) if width else (0, 1)
    positions = {len(set(rows.token_idx.tolist())) for rows in subject.points.values()}
    return rest == 0 and streams > 1 and streams not in positions


def _later_start(shape: tuple[int, ...], wanted: list[int], rows: Rows) -> bool:
    """Whether the shape is that of a sequence that begins after position 0: it has fewer cached rows than positions."""
    first = int(rows.token_idx.min())
    return first > 0 and len(shape) == len(wanted) and prod(shape) <= prod(wanted)


def _by_shape(rows: Rows) -> dict[tuple[int, ...], list[int]]:
    if "t+1" in (known.row if (known := parse(rows.point).known) else ()):
        return {shape: [r] for r, shape in enumerate(rows.shapes) if shape}
    rows_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for r, shape in enumerate(rows.shapes):
        if shape:
            rows_of[shape].append(r)
    return rows_of


def _shapes_disagree(subject: Subject) -> Iterator[Hit]:
    """Points with the same letter in the vocabulary have rows of different lengths."""
    by_letter: dict[tuple[int | None, tuple[str, ...]], dict[int, str]] = defaultdict(dict)
    several = subject.dataflow is None and _outputs_of_several_streams(subject)
    for name, rows in subject.points.items():
        known = parse(name).known
        if known is None or "t+1" in known.row or known.row in (("H*d",), ("K*d",)) or _streams(subject, name):
            continue
        if several and parse(name).kind == "l_out":
            continue
        for shape in _by_shape(rows):
            layer = parse(name).layer if known.row == ("F",) else None  # feed-forwards of two layers may differ in width
            by_letter[layer, known.row].setdefault(prod(shape), name)
    for lengths in by_letter.values():
        if len(lengths) > 1:
            listed = ", ".join(f"{name} {length}" for length, name in sorted(lengths.items())[:4])
            name = next(iter(lengths.values()))
            yield Hit(name, None, f"rows that must have the same length do not: {listed}")


def positions(subject: Subject) -> Iterator[Hit]:
    """Positions that a point lacks though others have them, that occur twice, or that are out of order."""
    every: Counter[int] = Counter()
    inner = {name: rows for name, rows in subject.points.items() if name not in (OUTPUT_NORM, LOGITS) and parse(name).known}
    for rows in inner.values():
        every.update(set(rows.token_idx.tolist()))
    last_layer = max((parse(name).layer or 0 for name in inner), default=0)
    # A position counts if most points have it: the others do not lack the positions of a single point.
    common = {position for position, points in every.items() if points * 2 > len(inner)}
    for name, rows in inner.items():
        lacking = tuple(sorted(common - set(rows.token_idx.tolist())))
        # Engines compute the end of the last layer, norm and logits only for rows that are asked for.
        if lacking and not (parse(name).layer == last_layer and max(common) in rows.token_idx):
            yield Hit(
                name, lacking[0], f"{name} lacks position{'s' * (len(lacking) > 1)} {ranges(lacking)}, which other points have"
            )


def doubled(subject: Subject) -> Iterator[Hit]:
    """Two records of one position and pass with different values; points in which it is the same are reported together.

    An engine without a cache computes the prompt again for each token: what differs by float32's rounding is one value.
    """
    alike: dict[tuple[int, str], list[str]] = defaultdict(list)
    for name, rows in subject.points.items():
        if (np.diff(rows.token_idx) > 0).all() or len(set(rows.token_idx.tolist())) == len(rows):
            continue
        places = zip(rows.seq.tolist(), rows.token_idx.tolist(), rows.step.tolist(), strict=True)
        first: dict[tuple[int, int, int], int] = {}
        heads = np.array([first.setdefault(place, r) for r, place in enumerate(places)])
        again = np.flatnonzero(heads != np.arange(len(rows)))
        bad = again[~same_values(rows, heads[again], again)].tolist()
        if bad:
            alike[len(bad), positions_of(rows, bad)].append(name)
    for (contradicting, where), names in alike.items():
        evidence = f"{_together(names)}: {contradicting + 1} records contradict others of their position and pass, {where}"
        yield Hit(names[0], int(subject.points[names[0]].token_idx.min()), evidence)


def _together(names: list[str]) -> str:
    """The first of several points by name, the others as a number."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more points" if len(names) > 3 else "")


def order(subject: Subject) -> Iterator[Hit]:
    """Positions that go back within one pass; points in which they do so alike are reported together."""
    alike: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, rows in subject.points.items():
        back = (np.diff(rows.token_idx) < 0) & (np.diff(rows.seq) == 0) & (np.diff(rows.step) == 0)
        if back.any():
            at = int(np.flatnonzero(back)[0])
            alike[int(rows.token_idx[at]), int(rows.token_idx[at + 1])].append(name)
    for (last, first), names in alike.items():
        yield Hit(
            names[0], first, f"{_together(names)} {'go' if len(names) > 1 else 'goes'} from position {last} back to {first}"
        )


def truncated(subject: Subject) -> Iterator[Hit]:
    """A file without an end record, or with fewer records than its end record counts."""
    dump = subject.dump
    if dump.torn:
        yield Hit(None, None, "the last line is cut short")
    elif dump.header is not None and dump.end is None:
        yield Hit(None, None, f"there is no end record after {dump.records} checkpoints: the writer was stopped")
    elif dump.end is not None and dump.end.checkpoints != dump.records:
        yield Hit(None, None, f"the end record counts {dump.end.checkpoints} checkpoints, but there are {dump.records}")
