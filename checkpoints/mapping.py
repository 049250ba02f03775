"""What a foreign engine's names mean (`--map names.toml`): their name = our point, with what must be done to the array.

layer_offset = -1            # their layer 1 is our layer 0
position_offset = 0

[names]
"h.{i}.attn.q" = { point = "blk.{i}.q", rope_pairs = "norm", heads = 14 }
"h.{i}" = "blk.{i}.l_out"
wte = { point = "embd", transpose = true }
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .points import parse, resolve
from .record import Dump, Rows

_KEYS = {"point", "transpose", "reshape", "rope_pairs", "heads"}


@dataclass(frozen=True)
class Entry:
    """What one of their names means, and what makes its array ours, in this order: reshape, transpose, rope_pairs."""

    pattern: re.Pattern[str]
    point: str
    reshape: tuple[int, ...] = ()
    transpose: bool = False
    rope_pairs: str = ""
    heads: int = 0

    @property
    def changes(self) -> bool:
        """Whether the array itself is changed."""
        return bool(self.reshape or self.transpose or self.rope_pairs)


@dataclass(frozen=True)
class Mapping:
    """All of a mapping file; an empty one knows the aliases only."""

    entries: tuple[Entry, ...] = ()
    layer_offset: int = 0
    position_offset: int | None = None
    path: str = field(default="", compare=False)

    def entry(self, name: str) -> tuple[str, Entry | None]:
        """Our point for their name, and the entry that says so (None where the aliases do)."""
        for entry in self.entries:
            match = entry.pattern.fullmatch(name)
            if match:
                layer = match.groupdict().get("i")
                number = "" if layer is None else str(int(layer) + self.layer_offset)
                return entry.point.replace("{i}", number), entry
        point = parse(resolve(name))
        if point.layer is not None and self.layer_offset:
            return f"blk.{point.layer + self.layer_offset}.{point.kind}", None
        return point.name, None

    def array(self, entry: Entry | None, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """An array made ours: [T, …].

        Raises:
            InputError: it does not have the shape that the mapping wants.
        """
        if entry is None or not entry.changes:
            return array
        try:
            made = array.reshape(entry.reshape) if entry.reshape else array
            made = made.T if entry.transpose else made
            return _repaired(made, entry) if entry.rope_pairs else made
        except ValueError as error:
            raise InputError(f"{self.path}: {entry.point}: {error}.", "Check the shapes.", code="map") from error

    def renamed(self, dump: Dump) -> Dump:
        """A dump of slices with our names.

        Raises:
            InputError: an entry would change arrays, of which a slice is only a part.
        """
        if not self.entries and not self.layer_offset:
            return dump
        points: dict[str, list[Rows]] = {}
        for name, rows in dump.points.items():
            ours, entry = self.entry(name)
            if entry is not None and entry.changes:
                if not rows.full().all():
                    raise InputError(
                        f"{self.path}: {name} is recorded as a slice; reshape, transpose and rope_pairs need whole rows.",
                        "Print all values of it, or arrays (.npz).",
                        code="map",
                    )
                values = np.stack([_one(self.array(entry, row[None])) for row in rows.values])
                rows = replace(rows, values=values, sketch=None, stats={})  # noqa: PLW2901
            points.setdefault(ours, []).append(replace(rows, point=ours))
        return replace(dump, points={name: Rows.stack(parts) for name, parts in points.items()})


def _one(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return array.reshape(-1)


def _repaired(array: NDArray[np.float32], entry: Entry) -> NDArray[np.float32]:
    """Rows [T, H·d] in the other pairing: "norm" (2i with 2i + 1) becomes "neox" (i with i + d/2), and the reverse."""
    if entry.heads < 1:
        raise ValueError("rope_pairs needs heads, the number of heads in the row")
    split = array.reshape(len(array), entry.heads, -1)
    half = split.shape[2] // 2
    if entry.rope_pairs == "norm":
        made = split.reshape(len(array), entry.heads, half, 2).swapaxes(2, 3)
    else:
        made = split.reshape(len(array), entry.heads, 2, half).swapaxes(2, 3)
    return np.ascontiguousarray(made).reshape(array.shape)


def read_mapping(path: Path) -> Mapping:
    """Read a mapping file.

    Raises:
        InputError: it cannot be read, or says something that is not known.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"cannot read {path}: {reason}.", "It is TOML: [names], their = our.", code="map") from error
    unknown = set(found) - {"names", "layer_offset", "position_offset"}
    if unknown:
        raise InputError(f"{path}: {sorted(unknown)[0]!r} is not known.", "Names belong below [names].", code="map")
    names = found.get("names", {})
    if not isinstance(names, dict):
        raise InputError(f"{path}: names must be a table.", "Write [names] in a line of its own.", code="map")
    layers, positions = found.get("layer_offset", 0), found.get("position_offset")
    if not all(
        isinstance(offset, int) and not isinstance(offset, bool) for offset in (layers, 0 if positions is None else positions)
    ):
        raise InputError(f"{path}: offsets are whole numbers.", code="map")
    entries = tuple(_entry(path, str(theirs), ours) for theirs, ours in names.items())
    return Mapping(entries, layers, positions, str(path))


def _entry(path: Path, theirs: str, ours: Any) -> Entry:
    said = {"point": ours} if isinstance(ours, str) else ours
    if not isinstance(said, dict) or not isinstance(said.get("point"), str) or set(said) - _KEYS:
        raise InputError(
            f"{path}: {theirs!r} must be a point, or a table with point and some of {', '.join(sorted(_KEYS - {'point'}))}.",
            'Write "their.name" = "blk.5.l_out".',
            code="map",
        )
    pairs, reshape = said.get("rope_pairs", ""), said.get("reshape", [])
    whole = isinstance(reshape, list) and all(isinstance(size, int) for size in reshape)
    if pairs not in ("", "norm", "neox") or not whole or not isinstance(said.get("heads", 0), int):
        raise InputError(
            f"{path}: {theirs!r}: rope_pairs is norm or neox, reshape a list of sizes, heads a number.", code="map"
        )
    pattern = re.escape(theirs).replace(re.escape("{i}"), r"(?P<i>\d{1,6})", 1)
    return Entry(
        re.compile(pattern), said["point"], tuple(reshape), bool(said.get("transpose")), pairs, int(said.get("heads", 0))
    )


def unknown_names(names: Sequence[str]) -> list[str]:
    """Names that are no point of the vocabulary, as sentences with the nearest known ones."""
    from difflib import get_close_matches

    from .points import KINDS

    said = []
    for name in names:
        point = parse(name)
        if point.known is None:
            near = get_close_matches(point.kind, KINDS, n=2)
            said.append(f"{name} is no known point" + (f"; nearest: {', '.join(near)}" if near else ""))
    return said
