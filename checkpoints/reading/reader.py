"""A dump of JSON lines, read whole (`checkpoints.reading.scan` says what is understood)."""

import os
from collections.abc import Iterator

from msgspec.structs import replace

from ..errors import DumpError
from ..record import Dump, End, Header, Rows, Token
from .line_order import counted, note_on
from .parallel import SHARED, Sharing
from .scan import Scan
from .slabs import blown_up

_DECISIVE = ("model", "tokens", "prompt", "mode", "compute", "kv_type")  # what decides with what, and how, records are compared


def read(path: str | os.PathLike[str], sharing: Sharing = SHARED) -> Dump:
    """Read a whole dump; `sharing` says how many processes read a large one.

    Raises:
        DumpError: no such file, nothing in it, no record in it, a newer format, or a record that contradicts itself.
    """
    scan = Scan(path, sharing)
    parts: dict[str, list[Rows]] = {}
    tokens: list[Token] = []
    headers: list[Header] = []
    ends: dict[int, End] = {}  # by the number of headers before it: dumps may have been appended to each other
    for item in scan:
        if isinstance(item, Rows):
            parts.setdefault(item.point, []).append(item)
        elif isinstance(item, Token):
            tokens.append(item)
        elif isinstance(item, End):
            ends[len(headers)] = item
        else:
            headers.append(item)
    points, unnumbered = {}, {}
    for name, batches in parts.items():
        if blown_up(batches):
            raise DumpError(
                f"{scan.name}: the records of {name} differ too much in their number of values.",
                "Print the same number in each.",
                code="record",
            )
        rows = Rows.stack(batches)
        points[name] = counted(rows, scan.name)
        if points[name] is not rows:
            unnumbered[name] = len(rows)
    end = End(sum(end.checkpoints for end in ends.values()), sum(end.tokens for end in ends.values())) if ends else None
    dump = Dump(scan.name, headers[-1] if headers else None, points, tuple(tokens), end, scan.skipped, (), scan.torn)
    counted_by_point = [note_on(unnumbered, len(points))] if unnumbered else []
    return replace(dump, notes=(*notes(dump), *_differences(headers), *counted_by_point))


def _differences(headers: list[Header]) -> Iterator[str]:
    """A note on what several headers of one file contradict each other in."""
    differing = [name for name in _DECISIVE if len({repr(getattr(header, name)) for header in headers}) > 1]
    if differing:
        yield f"the {len(headers)} headers differ in {', '.join(differing)}: the last one is taken to be that of all records"


def notes(dump: Dump) -> Iterator[str]:
    """What a reader of a dump should know: that it was cut short, that lines were left out."""
    if dump.torn:
        yield "the last line is cut short and was left out"
    if dump.header is not None and dump.end is None:
        yield "the dump has no end record: it was cut short; what is whole is used"
    if dump.end is not None and dump.end.checkpoints != dump.records:
        yield f"the end record counts {dump.end.checkpoints} records, {dump.records} are there"
    if dump.skipped:
        yield f"{dump.skipped} line{'s are no records and were' if dump.skipped > 1 else ' is no record and was'} skipped"
