"""The content of a report in any format: collected once, formatted by html.py, markdown.py and terminal.py."""

from collections.abc import Iterator

from msgspec import Struct

from checkpoints.answers.diff import Verdict
from checkpoints.answers.picture import Picture
from checkpoints.record import Dump, Header

from .findings import ReportSection
from .numbers import clean


class Report(Struct, frozen=True):
    """A comparison with everything that belongs beside it. `findings` are answers of other commands on the same dumps."""

    verdict: Verdict
    ours: Dump
    ref: Dump
    picture: Picture
    findings: tuple[ReportSection, ...] = ()


def how_it_was_run(report: Report) -> list[tuple[str, str, str]]:
    """Rows of (name, ours, reference); a row that is unknown on both sides is left out."""
    sides = [dict(_facts(dump.header)) for dump in (report.ours, report.ref)]
    names = list(dict.fromkeys(name for side in sides for name in side))
    rows = [(name, sides[0].get(name, ""), sides[1].get(name, "")) for name in names]
    files = ("dump", clean(report.ours.path), clean(report.ref.path))
    return [files, *(row for row in rows if row[1] or row[2])]


def prompt(report: Report) -> tuple[str, int]:
    """The prompt's text and its number of tokens; empty where neither header says it."""
    for header in (report.ref.header, report.ours.header):
        if header is not None and header.tokens:
            return clean(header.prompt if header.prompt is not None else "".join(header.pieces)), len(header.tokens)
    return "", 0


def _facts(header: Header | None) -> Iterator[tuple[str, str]]:
    if header is None:
        yield "header", "none: source, model and arithmetic are not known"
        return
    model = header.model
    named = [
        ("source", header.source),
        ("model", model.name),
        ("architecture", model.architecture),
        ("layers", "" if model.layers is None else str(model.layers)),
        ("file type", model.file_type),
        ("fingerprint", model.fingerprint),
        ("F32 twin", model.twin),
        ("mode", header.mode),
        ("compute", header.compute),
        ("KV type", header.kv_type),
        ("slice", str(header.slice)),
        *((str(name), _plain(value)) for name, value in header.build.items()),
        ("created", header.created),
    ]
    for name, value in named:
        yield clean(name), clean(value)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
