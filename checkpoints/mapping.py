"""What a foreign engine's names mean (`--map names.toml`): their name = our point, with the changes that the array needs.

layer_offset = -1            # their layer 1 is our layer 0
position_offset = 0

[names]
"h.{i}.attn.q" = { point = "blk.{i}.q", rope_pairs = "norm", heads = 14 }
"h.{i}" = "blk.{i}.l_out"
wte = { point = "embd", transpose = true }
"""

import re
from pathlib import Path
from typing import Any

from msgspec import Struct

from .errors import InputError
from .nesting import NestedTooDeeply, parsed
from .points import parse, resolve
from .regular import read_text

_LARGEST = 1 << 22  # bytes of a mapping file: 40,000 names
_LONGEST = 200  # characters of a point's name
_MOST_LAYERS = 100_000  # as many as a header may claim
_MOST_PARTS = 1000  # dots in a line, but for those in strings and comments
# TOML's comments and strings, closed or not, so that no text is searched twice.
_TEXTS = re.compile(r'''#[^\n]*|"""(?s:\\?.)*?(?:"""|\Z)|\'{3}(?s:.)*?(?:\'{3}|\Z)|"(?:\\.|[^"\\\n])*"?|\'[^\'\n]*\'?''')
_LAYER = "{i}"
_KEYS = {"point", "transpose", "reshape", "rope_pairs", "heads", "head_size"}


class MapEntry(Struct, frozen=True):
    """What one of their names means, and the changes that turn its array into ours, in this order: reshape, transpose, rope_pairs."""

    pattern: re.Pattern[str]
    point: str
    reshape: tuple[int, ...] = ()
    transpose: bool = False
    rope_pairs: str = ""
    heads: int = 0
    head_size: int = 0

    @property
    def changes(self) -> bool:
        """Whether the array itself is changed."""
        return bool(self.reshape or self.transpose or self.rope_pairs)


class Mapping(Struct, frozen=True):
    """The whole mapping file; an empty one knows only the aliases."""

    entries: tuple[MapEntry, ...] = ()
    layer_offset: int = 0
    position_offset: int | None = None
    path: str = ""

    def entry(self, name: str) -> tuple[str, MapEntry | None]:
        """Our point for their name, and the entry that says so (None if it is an alias)."""
        for entry in self.entries:
            match = entry.pattern.fullmatch(name)
            if match:
                layer = match.groupdict().get("i")
                number = "" if layer is None else str(int(layer) + self.layer_offset)
                return entry.point.replace(_LAYER, number), entry
        point = parse(resolve(name))
        if point.layer is not None and self.layer_offset:
            return f"blk.{point.layer + self.layer_offset}.{point.kind}", None
        return point.name, None


def read_mapping(path: Path) -> Mapping:
    """Read a mapping file.

    Raises:
        InputError: it cannot be read, or contains something unknown.
    """
    import tomllib

    try:
        text = read_text(path, _LARGEST).removeprefix("\ufeff")
        if any(line.count(".") > _MOST_PARTS for line in _TEXTS.sub("", text).splitlines()):
            raise NestedTooDeeply  # tomllib takes a minute for a key with 20,000 parts
        table = parsed(tomllib.loads, text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else reason
        raise InputError(f"cannot read {path}: {reason}.", "It is TOML: [names], their = our.", code="map") from error
    unknown = set(table) - {"names", "layer_offset", "position_offset"}
    if unknown:
        raise InputError(f"{path}: {sorted(unknown)[0]!r} is an unknown key.", "Names belong below [names].", code="map")
    names = table.get("names", {})
    if not isinstance(names, dict):
        raise InputError(f"{path}: names must be a table.", "Write [names] in a line of its own.", code="map")
    layers, positions = table.get("layer_offset", 0), table.get("position_offset")
    if not _is_number(layers) or not (positions is None or _is_number(positions)):
        raise InputError(f"{path}: offsets must be whole numbers.", code="map")
    if abs(layers) > _MOST_LAYERS:
        raise InputError(f"{path}: a layer_offset of {layers} is larger than any number of layers.", code="map")
    entries = tuple(_entry(path, str(engine_name), ours) for engine_name, ours in names.items())
    return Mapping(entries, layers, positions, str(path))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _entry(path: Path, engine_name: str, ours: Any) -> MapEntry:
    entry = {"point": ours} if isinstance(ours, str) else ours
    if not isinstance(entry, dict) or not isinstance(entry.get("point"), str) or set(entry) - _KEYS:
        raise InputError(
            f"{path}: {engine_name!r} must be a point, or a table with point and some of {', '.join(sorted(_KEYS - {'point'}))}.",
            'Write "their.name" = "blk.5.l_out".',
            code="map",
        )
    point = entry["point"]
    if not point or len(point) > _LONGEST or not point.isprintable():
        raise InputError(
            f"{path}: {engine_name[:_LONGEST]!r} has {point[:_LONGEST]!r} as its point, which is not a name.",
            "Points are named as in `parity model`.",
            code="map",
        )
    if (engine_name.count(_LAYER), point.count(_LAYER)) not in ((0, 0), (1, 1)):
        raise InputError(
            f"{path}: {engine_name!r} = {point!r}: {_LAYER} stands for the number of the layer, once on each side or on neither.",
            'Write "h.{i}" = "blk.{i}.l_out".',
            code="map",
        )
    pairs, reshape = entry.get("rope_pairs", ""), entry.get("reshape", [])
    transpose, heads, head_size = entry.get("transpose", False), entry.get("heads", 0), entry.get("head_size", 0)
    if (
        pairs not in ("", "norm", "neox")
        or not isinstance(reshape, list)
        or not all(_is_number(size) for size in reshape)
        or not isinstance(transpose, bool)
        or not all(_is_number(size) and size >= 0 for size in (heads, head_size))
    ):
        raise InputError(
            f"{path}: {engine_name!r}: rope_pairs is norm or neox, reshape a list of sizes, transpose true or false, "
            "heads and head_size are numbers.",
            code="map",
        )
    pattern = re.escape(engine_name).replace(re.escape(_LAYER), r"(?P<i>\d{1,6})")
    return MapEntry(re.compile(pattern), entry["point"], tuple(reshape), transpose, pairs, heads, head_size)
