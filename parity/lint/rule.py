"""The definition of a rule, and of the subject that it checks."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.dataflow import Computation, Dataflow
from checkpoints.points import EMBD, ENCODER, in_layer, order, parse
from checkpoints.record import ATTENTION_WINDOW, Dump, Rows
from reports.numbers import count, ranges

from .model_facts import ModelFacts


class Hit(Struct, frozen=True):
    """One finding before the table adds its texts. `severity` replaces the rule's own; `points` are all that it is about."""

    checkpoint: str | None
    token_idx: int | None
    evidence: str
    severity: str | None = None
    points: tuple[str, ...] = ()


class Rule(Struct, frozen=True):
    """One thing that can be wrong with a dump; `check` yields where it is wrong.

    `of_weights`: flat weights of the model (`ModelFacts.has_flat_weights`) give a right engine such values, too.
    """

    name: str
    severity: str
    check: Callable[["Subject"], Iterator[Hit]]
    cause: str
    advice: str
    of_weights: bool = False

    def hits(self, subject: "Subject") -> list[Hit]:
        """The hits that the model's own weights do not explain."""
        return [hit for hit in self.check(subject) if not (self.of_weights and subject.by_weights(hit))]


Place = tuple[int, int, int]  # seq, token_idx, step

# A vector identifies itself by its values only if it has this many, so many of them different: the few numbers
# of a constant or nearly empty row may agree by chance.
TELLING = 4


# What a layer computes that keeps a cache of its own.
_KEYS_AND_VALUES = ("k", "v", "k_norm", "k_rope")


class Subject(Struct, frozen=True, dict=True):
    """A dump as rules see it; `model` is known with `--model`, `given` is the dataflow of another dump of the model."""

    dump: Dump
    model: ModelFacts | None = None
    given: Dataflow | None = None

    @cached_property
    def dataflow(self) -> Dataflow | None:
        """What each point is made from, if this dump or another one states it."""
        return self.given if self.given is not None else self._own[0]

    @property
    def refused_dataflow(self) -> str:
        """Why the dataflow in the dump's header cannot be used; empty if it can, or if there is none."""
        return self._own[1]

    @cached_property
    def _own(self) -> tuple[Dataflow | None, str]:
        """The dataflow of the dump's header, or why it cannot be used."""
        header = self.dump.header
        if header is None or not header.dataflow:
            return None, ""
        try:
            return Dataflow.from_json(header.dataflow), ""
        except ValueError as error:
            return None, str(error)

    def computation(self, name: str) -> Computation | None:
        """How a point is made, None if it is not known."""
        return None if self.dataflow is None else self.dataflow.computations.get(name)

    def home(self, name: str) -> int | None:
        """The layer whose keys and values a point is made from: layers may share a cache."""
        layer = parse(name).layer
        if layer is None:
            return None
        read = self.computation(in_layer(layer, "v_read"))
        if read is None:
            return self._shared_caches.get(layer, layer)
        shared = {parse(other).layer for other in read.reads}
        return shared.pop() if len(shared) == 1 else layer

    @cached_property
    def _shared_caches(self) -> dict[int, int]:
        """Where nothing but the records shows it: a layer that has no keys and values of its own -> the earlier one whose it reads.

        A kept pointer shows another layer's vector where this layer has its own.
        """
        if self.model is not None and self.model.alike:
            return {}
        layers = {layer for name in self.points if (layer := parse(name).layer) is not None}
        own = sorted(layer for layer in layers if any(in_layer(layer, kind) in self.points for kind in _KEYS_AND_VALUES))
        shared: dict[int, int] = {}
        for layer in sorted(layers.difference(own)):
            earlier = next((other for other in own if other < layer and self._one_cache(other, layer)), None)
            if earlier is not None:
                shared[layer] = earlier
        return shared

    def _one_cache(self, first: int, second: int) -> bool:
        """Whether two layers read the same from their caches; where neither's is recorded, whether attention over the first position
        alone, which gives that position's value, does.
        """
        pairs = [(in_layer(first, kind), in_layer(second, kind)) for kind in ("k_read", "v_read")]
        read = [_values_at(self.points[a]) == _values_at(self.points[b]) for a, b in pairs if {a, b} <= self.points.keys()]
        if read:
            return all(read)
        a, b = in_layer(first, "kqv_out"), in_layer(second, "kqv_out")
        if not {a, b} <= self.points.keys():
            return False
        values, others = _values_at(self.points[a]), _values_at(self.points[b])
        return any(place[1] == 0 and values[place] == others.get(place) for place in values)

    @cached_property
    def points(self) -> dict[str, Rows]:
        """Rows by point, in dataflow order."""
        return {name: self.dump.points[name] for name in order(self.dump.points)}

    @cached_property
    def vectors(self) -> dict[str, list[tuple[Place, bytes]]]:
        """For each point, the records whose values also occur in another record, with the values as bytes.

        Only records with distinctive values are included.
        """
        usable = {name: telling(rows).nonzero()[0] for name, rows in self.points.items()}
        hashes = [_hashes(rows)[usable[name]] for name, rows in self.points.items()]
        _, which, often = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]), return_inverse=True, return_counts=True)
        repeated = np.split((often > 1)[which], np.cumsum([len(several) for several in hashes])[:-1]) if hashes else []
        vectors: dict[str, list[tuple[Place, bytes]]] = {}
        for (name, rows), repeated_rows in zip(self.points.items(), repeated, strict=True):
            members = usable[name][repeated_rows]
            places = zip(rows.seq[members].tolist(), rows.token_idx[members].tolist(), rows.step[members].tolist(), strict=True)
            counts = rows.counts[members].tolist()
            vectors[name] = [
                (place, rows.values[r, :count].tobytes())
                for place, r, count in zip(places, members.tolist(), counts, strict=True)
            ]
        return vectors

    def by_weights(self, hit: Hit) -> bool:
        """Whether the layers that a finding is about have flat weights, as far as the model is known."""
        if self.model is None:
            return False
        layers = {parse(name).layer for name in hit.points or (hit.checkpoint or "",)}
        return any(map(self.model.has_flat_weights, {None, *layers}))

    @cached_property
    def layers(self) -> int | None:
        """How many layers the model has; None if nothing states it."""
        if self.model is not None:
            return self.model.layers
        return self.dump.header.model.layers if self.dump.header is not None else None

    @property
    def window(self) -> int | None:
        """How many positions attention sees in layers with a window, by the model file or the dump's header; None if neither says."""
        if self.model is not None:
            return self.model.window
        header = self.dump.header
        size = (header.hparams or {}).get(ATTENTION_WINDOW) if header is not None else None
        return size if isinstance(size, int) else None

    @cached_property
    def ids(self) -> dict[int, int]:
        """Position -> token id of sequence 0, from the header's tokens and the generated ones.

        The header's tokens are assigned to positions only if that is beyond doubt: from 0 on, or from the first recorded
        position if the dump begins later (`--first-position`) and has exactly as many prefill positions as tokens.
        """
        known = {token.token_idx: token.id for token in self.dump.tokens if token.seq == 0}
        header = self.dump.header
        # An encoder's input is the prompt; its decoder has other positions.
        if header is None or not header.tokens or any(name.startswith(ENCODER) for name in self.points):
            return known
        recorded = [rows.token_idx[(rows.seq == 0) & ~rows.decode] for rows in self.points.values()]
        first = min((int(positions.min()) for positions in recorded if len(positions)), default=0)
        last = max((int(positions.max()) for positions in recorded if len(positions)), default=0)
        if last < len(header.tokens):
            first = 0
        elif last - first + 1 != len(header.tokens):
            return known
        return {first + i: token for i, token in enumerate(header.tokens)} | known

    def inputs(self, positions: Sequence[int]) -> Mapping[int, Hashable]:
        """For each of these positions its token, as an id or as the recorded embedding; empty if some are not known."""
        known: tuple[Mapping[int, Hashable], ...] = (self.ids, self._embeddings)
        return next((tokens for tokens in known if tokens.keys() >= set(positions)), {})

    def same_input(self, a: int, b: int) -> bool | None:
        """Whether the tokens at two positions are the same; None if neither ids nor embeddings show it."""
        if a in self.ids and b in self.ids:
            return self.ids[a] == self.ids[b]
        rows = self._embeddings
        return rows[a] == rows[b] if a in rows and b in rows else None

    @cached_property
    def _embeddings(self) -> dict[int, bytes]:
        """The recorded embedding of each position, as bytes; empty if none was recorded."""
        embd = self.points.get(EMBD)
        if embd is None:
            return {}
        return {int(position): bytes(embd.values[r].tobytes()) for r, position in enumerate(embd.token_idx)}

    @cached_property
    def uniform_until(self) -> int:
        """The first position whose token differs from the one before: up to there attention has one value to choose from."""
        positions = sorted({int(t) for rows in self.points.values() for t in rows.token_idx})
        for before, after in pairwise(positions):
            if not self.same_input(before, after):
                return after
        return positions[-1] + 1 if positions else 0


def _values_at(rows: Rows) -> dict[Place, bytes]:
    """The values of each record, as bytes."""
    places = zip(rows.seq.tolist(), rows.token_idx.tolist(), rows.step.tolist(), strict=True)
    return {place: leading(rows, number).tobytes() for number, place in enumerate(places)}


def _hashes(rows: Rows) -> NDArray[np.uint64]:
    """uint64 [R]: a hash of each record's values: equal for equal values, nearly always different otherwise."""
    width = rows.values.shape[1]
    bits = np.ascontiguousarray(rows.values).view(np.uint32).astype(np.uint64)
    inside = np.arange(width)[None, :] < rows.counts[:, None]
    factors = _factors(width)
    total: NDArray[np.uint64] = (np.where(inside, bits + np.uint64(1), np.uint64(0)) * factors).sum(axis=1, dtype=np.uint64)
    return total


def _factors(width: int) -> NDArray[np.uint64]:
    """Odd pseudo-random numbers, uint64 [width]: SplitMix64 (Steele, Lea and Flood 2014). Importing numpy.random takes 10 ms."""
    bits = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31)) | np.uint64(1)


def leading(rows: Rows, r: int) -> NDArray[np.float32]:
    """The values of one record without padding."""
    row: NDArray[np.float32] = rows.values[r, : int(rows.counts[r])]
    return row


def telling(rows: Rows) -> NDArray[np.bool_]:
    """bool [R]: records with enough different finite values to be distinguished from others."""
    if not len(rows) or rows.values.shape[1] < TELLING:
        return np.zeros(len(rows), dtype=np.bool_)
    values = np.sort(rows.values, axis=1)  # padding and NaN sort to the end
    finite = np.isfinite(values[:, 1:]) & np.isfinite(values[:, :-1])
    different = 1 + np.sum((values[:, 1:] != values[:, :-1]) & finite, axis=1)
    enough: NDArray[np.bool_] = (different >= TELLING) & (rows.counts >= TELLING)
    return np.asarray(enough & ~of_ids(rows))  # they are few, and often the same


def of_ids(rows: Rows) -> NDArray[np.bool_]:
    """bool [R]: rows of ids, such as chosen experts: by their type, or different whole numbers of a node outside the vocabulary."""
    if rows.dtype.startswith("i"):
        return np.ones(len(rows), dtype=np.bool_)
    if parse(rows.point).known is not None or rows.values.shape[1] < 2:
        return np.zeros(len(rows), dtype=np.bool_)
    inside = np.arange(rows.values.shape[1])[None, :] < rows.counts[:, None]
    whole: NDArray[np.bool_] = np.all((rows.values == np.rint(rows.values)) & (rows.values >= 0) | ~inside, axis=1)
    ordered = np.sort(np.where(inside, rows.values, np.nan), axis=1)  # NaN at the end
    return np.asarray(whole & ~np.any(ordered[:, 1:] == ordered[:, :-1], axis=1))


def where(positions: Sequence[int], total: int | None = None) -> str:
    """ "at all 8 positions", "at position 3", "at positions 0–4, 7"."""
    unique = tuple(sorted(set(positions)))
    if total is not None and len(unique) == total > 1:
        return f"at all {total} positions"
    return f"at position {unique[0]}" if len(unique) == 1 else f"at positions {ranges(unique)}"


def kind(name: str) -> str:
    """A point's name in its layer."""
    return parse(name).kind


def by_point(rows_of: dict[str, list[int]], subject: Subject, sentence: Callable[[str, list[int]], str]) -> Iterator[Hit]:
    """One hit for each point, however many of its records are affected."""
    for name, rows in rows_of.items():
        first = min(rows, key=lambda r: int(subject.points[name].token_idx[r]))
        yield Hit(name, int(subject.points[name].token_idx[first]), sentence(name, rows))


def positions_of(rows: Rows, members: Sequence[int]) -> str:
    """The positions of records as text: "at position 3", "at 7 positions"."""
    listed = sorted({int(rows.token_idx[r]) for r in members})
    if len(listed) == len(set(rows.token_idx.tolist())) > 1:
        return f"at all {len(listed)} positions"
    return where(listed) if len(listed) <= 12 else f"at {count(len(listed), 'position')}"
