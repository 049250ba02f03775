"""The values of many versions of a model's steps that differ from the right run's: by name, those of all versions in one array."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from msgspec import Struct

from ..backend import Array, module_of


class _Stack(Struct):
    """One value in the versions, in ascending order, in which it differs: [M, …]."""

    versions: list[int]
    array: Array


class Versions:
    """What differs from the right run's values, `right`, in each of `count` versions.

    Values of the right one's shape and type lie in one array for all versions, so that a step takes them together without gathering
    them; others, and values that the right run does not have, are kept by themselves.
    """

    def __init__(self, right: Mapping[str, Array], count: int) -> None:
        self._right = right
        self._stacks: dict[str, _Stack] = {}
        self._apart: dict[str, dict[int, Array]] = {}
        self._ended = [False] * count

    def reading(self, names: Collection[str]) -> set[int]:
        """The versions in which one of these values differs."""
        stacks = [self._stacks[name].versions for name in names if name in self._stacks]
        return set().union(*stacks, self.apart(names))

    def apart(self, names: Iterable[str]) -> set[int]:
        """The versions in which one of these values has another shape or type than the right one."""
        return {version for name in names for version in self._apart.get(name, ())}

    def goes_on(self, version: int) -> bool:
        """Whether a version has not ended."""
        return not self._ended[version]

    def of(self, version: int, names: Iterable[str]) -> dict[str, Array]:
        """Those of these values that differ in a version."""
        values: dict[str, Array] = {}
        for name in names:
            stack = self._stacks.get(name)
            if name in self._apart and version in self._apart[name]:
                values[name] = self._apart[name][version]
            elif stack is not None:
                at = int(np.searchsorted(stack.versions, version))
                if at < len(stack.versions) and stack.versions[at] == version:
                    values[name] = stack.array[at]
        return values

    def joined(self, name: str, versions: list[int]) -> Array:
        """A value in these versions, in ascending order, one after the other: [M · R, …]."""
        right, stack = self._right[name], self._stacks.get(name)
        xp = module_of(right)
        if stack is None:
            return xp.concatenate([right] * len(versions))
        if stack.versions != versions:
            array = xp.empty((len(versions), *right.shape), right.dtype)
            array[:] = right
            _, here, there = np.intersect1d(versions, stack.versions, assume_unique=True, return_indices=True)
            array[xp.asarray(here)] = stack.array[xp.asarray(there)]
            return array.reshape(-1, *right.shape[1:])
        return stack.array.reshape(-1, *right.shape[1:])

    def put(self, name: str, versions: Sequence[int], array: Array) -> None:
        """Keep a value in these versions, in ascending order, where it differs from the right one: [M, …], of the right one's shape."""
        right = self._right[name]
        if array.dtype != right.dtype:
            self.put_each(name, dict(zip(versions, array, strict=True)))
            return
        differs = (array != right).reshape(len(versions), -1).any(axis=1)
        mask = differs.tolist()
        if not all(mask):
            array = array[differs]
        self._add(name, [version for version, other in zip(versions, mask, strict=True) if other], array)

    def put_each(self, name: str, values: Mapping[int, Array]) -> None:
        """Keep a value, by version; it is known to differ from the right one."""
        right = self._right.get(name)
        alike = {
            version: value
            for version, value in values.items()
            if right is not None and value.shape == right.shape and value.dtype == right.dtype
        }
        if alike:
            versions = sorted(alike)
            array = module_of(right).stack([alike[version] for version in versions])
            self._add(name, versions, array)
        if len(alike) < len(values):
            others = {version: value for version, value in values.items() if version not in alike}
            self._apart.setdefault(name, {}).update(others)
            self._drop(name, others)

    def _add(self, name: str, versions: list[int], array: Array) -> None:
        """Put an array to that of a name's other versions."""
        if not versions:
            return
        stack = self._stacks.get(name)
        if stack is not None:
            self._drop(name, versions)
            stack = self._stacks.get(name)
        if stack is not None:
            xp = module_of(array)
            versions, array = [*stack.versions, *versions], xp.concatenate([stack.array, array])
            order = np.argsort(versions)
            versions, array = [versions[at] for at in order], array[xp.asarray(order)]
        self._stacks[name] = _Stack(versions, array)

    def _drop(self, name: str, versions: Collection[int]) -> None:
        """Forget a stacked value in these versions."""
        stack = self._stacks.get(name)
        gone = set(versions)
        if stack is None or gone.isdisjoint(stack.versions):
            return
        kept = [at for at, version in enumerate(stack.versions) if version not in gone]
        if not kept:
            del self._stacks[name]
            return
        stack.array = stack.array[module_of(stack.array).asarray(kept)]
        stack.versions = [stack.versions[at] for at in kept]

    def having(self, name: str) -> tuple[list[int], Array | None]:
        """The versions in which a value differs, and the value in each: [M, …]."""
        stack, apart = self._stacks.get(name), self._apart.get(name)
        if not apart:
            return ([], None) if stack is None else (stack.versions, stack.array)
        versions = sorted(self.reading([name]))
        values = [self.of(version, [name])[name] for version in versions]
        return versions, module_of(values[0]).stack(values)

    def end(self, versions: Collection[int]) -> None:
        """These versions do not go on: what they have is forgotten."""
        for version in versions:
            self._ended[version] = True
        for name in list(self._stacks) if versions else ():
            self._drop(name, versions)
        for values in self._apart.values() if versions else ():
            for version in versions:
                values.pop(version, None)

    def forget(self, name: str) -> None:
        """No step reads this value any more."""
        self._stacks.pop(name, None)
        self._apart.pop(name, None)

    def left(self) -> list[dict[str, Array] | None]:
        """What each version still has, by name; None for one that has ended."""
        values: list[dict[str, Array] | None] = [None if ended else {} for ended in self._ended]
        stacked = ((n, pair) for n, s in self._stacks.items() for pair in zip(s.versions, s.array, strict=True))
        apart = ((n, pair) for n, of_name in self._apart.items() for pair in of_name.items())
        for name, (version, value) in (*stacked, *apart):
            of_version = values[version]
            if of_version is not None:
                of_version[name] = value
        return values
