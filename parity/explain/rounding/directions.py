"""All records of a dump as one long row, in which the part of its error along the effect of a fault can be measured.

What lower arithmetic leaves is taken out of both first: the errors of our own rounding of products and of every activation, and what a
common factor of all results or products moves, which engines make that cut digits off (they seemed to have another epsilon).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.summary import signs
from engine.backend import Array
from engine.graph import Step
from engine.replay.precision import multiplies, rounded

from ..case import Case
from ..records.records import Expected, Floats, Ints


class Along(Struct, frozen=True):
    """The part of an error along an effect.

    Attributes:
        times: the effect's multiple that fits. spread: its standard deviation, of positions and points.
        removed: the share of the error's energy that the effect itself, once, takes away; negative if it adds more.
        fitted: the share that the multiple which fits takes away.
        by_position, by_point: the share of the positions and points, by the effect's energy, at which the multiple is near one.
        points: in how many points it acts. records, elements: of how many alike the effect would be as spread as it is.
    """

    times: float
    spread: float
    removed: float
    fitted: float
    by_position: float
    by_point: float
    points: int
    records: float
    elements: float


_NEAR = 0.5  # of one: a position's multiple
CHANGE = 2.0**-8  # of a result, as a part of it: what float32 itself rounds is a part in 10,000 of what it moves
_OWN = 1e-4  # the part of a direction that is not in the others, from which on it is one of its own
_SHOWS = 1e-3  # of the effect's energy, which a point has in which it acts


class Scaled(Struct, frozen=True):
    """An operation whose result is a little smaller."""

    op: Callable[..., Array]

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        """The result, a little smaller where it is a number."""
        value = self.op(*inputs, **params)
        return value * value.dtype.type(1 - CHANGE) if value.dtype.kind == "f" else value


class Noise(Struct, frozen=True):
    """What one arithmetic leaves at some points of the right engine: values by point, of whole runs.

    Attributes:
        rounded: with products rounded, and with every activation rounded. scaled: with every result, and with every product, a little
            smaller.
    """

    rounded: tuple[Mapping[str, NDArray[np.float32]], ...]
    scaled: tuple[Mapping[str, NDArray[np.float32]], ...]


def noise_of(case: Case, kind: str, entries: Sequence[Expected]) -> Noise:
    """The noise of an arithmetic at the points of these entries."""
    points = {entry.point for entry in entries}
    steps, host = case.transformer.steps, case.transformer.backend.to_host

    def in_lower(storage: bool) -> Mapping[str, NDArray[np.float32]]:
        lower = rounded(steps, kind, storage=storage)
        return case.make(lower, len(case.positions), None, case.rounded(kind, storage)).on_host

    def smaller(acts: Callable[[Step], bool]) -> Mapping[str, Array]:
        return case.replay.changed([replace(step, op=Scaled(step.op)) if acts(step) else step for step in steps])

    return Noise(
        rounded=tuple({name: run[name] for name in points} for run in map(in_lower, (False, True))),
        scaled=tuple(
            {name: host(value) for name, value in smaller(acts).items() if name in points}
            for acts in (lambda _: True, multiplies)
        ),
    )


def plain_rows(case: Case) -> list[Expected]:
    """The entries of a case whose rows are plain vectors: not attention's scores, nor what is read from a cache."""
    right = case.replay.on_host
    return [entry for entry in case.entries if entry.whole_values(right[entry.point], case.positions) is not None]


class Directions:
    """Records of a case, some of its `plain_rows`, beside the noise of one arithmetic; what is not finite takes no part."""

    @np.errstate(over="ignore", invalid="ignore")  # sums and differences of infinities, a mask's say
    def __init__(self, case: Case, noise: Noise, entries: Sequence[Expected]) -> None:
        self._positions, self._entries = case.positions, entries
        right = case.replay.on_host
        self._signs = {
            entry.point: signs(0, right[entry.point].size // len(case.positions))
            for entry in entries
            if entry.pair.ours.sketch is not None
        }
        self._shapes = {entry.point: right[entry.point].shape for entry in entries}
        self.points = frozenset(entry.point for entry in entries)
        ours = [self._recorded(entry) for entry in entries]
        self._point: Ints = np.concatenate([np.full(part.size, number) for number, part in enumerate(ours)])
        self._position: Ints = np.concatenate(
            [np.repeat(entry.rows, part.shape[1]) for entry, part in zip(entries, ours, strict=True)]
        )
        self._right = self._of(right)
        noises = [self._of(run) - self._right for run in noise.rounded]
        error = np.concatenate([part.ravel() for part in ours]) - self._right
        self._used = np.isfinite(error) & np.isfinite(noises[0]) & np.isfinite(noises[1])
        self._weight = self._weights(noises)
        shared = [self._weighted(change) for change in noises]
        shared += [self._weighted(self._of(run) - self._right) for run in noise.scaled]
        shared += [np.where(self._point == number, self._weighted(self._right), 0.0) for number in range(len(entries))]
        units = [row / size for row in shared if np.isfinite(size := np.linalg.norm(row)) and size > 0]
        basis, sizes, _ = np.linalg.svd(np.reshape(units, (len(units), len(error))).T, full_matrices=False)
        self._shared = basis[:, sizes > _OWN * sizes.max(initial=0.0)]
        self._error = self._apart(self._weighted(error))
        self.energy = float(self._error @ self._error)

    def _recorded(self, entry: Expected) -> Floats:
        values, sketch = np.where(entry.present, entry.values, np.nan), entry.pair.ours.sketch
        return values if sketch is None else np.hstack([values, np.asarray(sketch, np.float64)])

    def _of(self, values: Mapping[str, NDArray[np.float32]]) -> Floats:
        """The recorded elements of a run, the right ones where it has no other."""
        parts, done = [], 0
        for entry in self._entries:
            size = len(entry.rows) * (
                entry.values.shape[1] + (self._signs[entry.point].shape[1] if entry.point in self._signs else 0)
            )
            if entry.point not in values:
                parts.append(self._right[done : done + size])
            else:
                tensor = values[entry.point]
                part = entry.taken(tensor, self._positions)
                if entry.point in self._signs:
                    whole = tensor.reshape(len(self._positions), -1).astype(np.float64)[entry.rows]
                    part = np.hstack([part, whole @ self._signs[entry.point]])
                parts.append(part.ravel())
            done += size
        return np.concatenate(parts)

    def _weights(self, noises: list[Floats]) -> Floats:
        """Of each element, one over the noise that is measured in it: of its record or, in a record with hardly any, of the point."""
        weight = np.zeros(len(self._right))
        for entry_number, entry in enumerate(self._entries):
            sketched = entry.point in self._signs
            of_point = self._point == entry_number
            is_sketch = np.zeros(len(weight), dtype=np.bool_)
            if sketched:
                width = entry.values.shape[1]
                columns = np.arange(int(of_point.sum())) % (width + self._signs[entry.point].shape[1]) >= width
                is_sketch[np.flatnonzero(of_point)[columns]] = True
            for part in (of_point & ~is_sketch & self._used, of_point & is_sketch & self._used):
                rows = self._position[part]
                if not len(rows):
                    continue
                energy = np.max([np.bincount(rows, noise[part] ** 2) for noise in noises], axis=0)
                count = np.bincount(rows)
                of_rows = energy / np.maximum(count, 1)
                usual = float(energy.sum() / count.sum())
                floor = np.maximum(of_rows, 0.1 * usual)[rows]
                weight[part] = np.divide(1.0, np.sqrt(floor), out=np.zeros(len(rows)), where=floor > 0)
        return weight

    def _weighted(self, row: Floats) -> Floats:
        return np.where(self._used & (self._weight > 0), row, 0.0) * self._weight

    def _apart(self, row: Floats) -> Floats:
        return np.asarray(row - self._shared @ (self._shared.T @ row))

    @np.errstate(over="ignore", invalid="ignore")
    def effect(self, values: Mapping[str, NDArray[np.float32]]) -> Floats | None:
        """What a run changes of the records, without the part that it shares with the noise; None if it is not finite or all of that."""
        if any(np.shape(value) != self._shapes.get(name, np.shape(value)) for name, value in values.items()):
            return None
        change = self._weighted(self._of(values) - self._right)
        if not np.isfinite(change).all() or not change.any():
            return None
        rest = self._apart(change)
        return rest if float(rest @ rest) > 0.1 * float(change @ change) else None

    def _near_one(self, effect: Floats, groups: Ints) -> float:
        energies, products = np.bincount(groups, effect * effect), np.bincount(groups, effect * self._error)
        return float(energies[np.abs(products - energies) <= _NEAR * energies].sum() / energies.sum())

    def largest(self, effect: Floats) -> tuple[str, int]:
        """The point, and the row, of the record with the largest effect."""
        width = int(self._position.max()) + 1
        point, position = divmod(int(np.argmax(np.bincount(self._point * width + self._position, effect * effect))), width)
        return self._entries[point].point, position

    def along(self, effect: Floats) -> Along:
        """The part of the error along an effect."""
        energy = float(effect @ effect)
        times = float(effect @ self._error) / energy
        left = self._error - times * effect
        once = self._error - effect
        groups = self._point * (int(self._position.max()) + 1) + self._position
        of_groups = np.bincount(groups, effect * left)
        of_points = np.bincount(self._point, effect * effect)
        return Along(
            times=times,
            spread=float(np.sqrt((of_groups**2).sum()) / energy),
            removed=1 - float(once @ once) / self.energy if self.energy > 0 else -np.inf,
            fitted=times * times * energy / self.energy if self.energy > 0 else 0.0,
            by_position=self._near_one(effect, self._position),
            by_point=self._near_one(effect, self._point),
            points=int((of_points > _SHOWS * energy).sum()),
            records=_alike(np.asarray(np.bincount(groups, effect * effect), np.float64)),
            elements=_alike(effect * effect),
        )


def _alike(energies: Floats) -> float:
    """How many equal ones would be as spread as these."""
    return float(energies.sum() ** 2 / (energies**2).sum())
