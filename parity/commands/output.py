"""What commands print: answers and facts on stdout, progress on stderr and only to a terminal."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from checkpoints.printable import no_command, printable

from .options import Format

if TYPE_CHECKING:
    from rich.text import Text

    from checkpoints.record import Dump
    from reference.jobs import Tokens

    from ..run.request import Progress

PARITY_CODE = 0
DIVERGENCE_CODE = 1


class Room(Protocol):
    """A module of `reports` that shows one kind of answer."""

    def lines(self, result: Any, width: int) -> Iterable["Text"]:
        """As text, for a terminal of `width` columns."""

    def as_json(self, result: Any) -> dict[str, Any]:
        """As one JSON object."""


def answer(result: Any, room: Room, output_format: Format) -> int:
    """Print an answer that is true if nothing is wrong, and return the exit code."""
    if output_format is Format.JSON:
        print(json.dumps(room.as_json(result)))
    else:
        from rich.console import Console

        from reports.header import print_lines

        console = Console()
        print_lines(console, list(room.lines(result, console.width)))
    return PARITY_CODE if result else DIVERGENCE_CODE


def catalogue_as(output_format: Format) -> None:
    """Print the catalogue of known faults."""
    from engine.faults import CATALOGUE

    if output_format is Format.JSON:
        faults = [
            {"fault": fault.name, "group": fault.group, "symptom": fault.symptom, "fix": fault.fix, "seen": fault.seen}
            for fault in CATALOGUE.values()
        ]
        print(json.dumps({"schema": 1, "faults": faults}))
        return
    from rich.console import Console

    from reports.catalogue import catalogue_lines
    from reports.header import print_lines

    console = Console()
    rows = [(fault.group, fault.name, fault.symptom, fault.fix, fault.seen) for fault in CATALOGUE.values()]
    print_lines(console, catalogue_lines(rows, console.width))


def notes(dump: "Dump") -> None:
    """Print on stderr what the reader noticed about a dump, if the answer itself has no place for it."""
    for note in dump.notes:
        print(no_command(printable(f"{dump.path}: {note}", 1000)), file=sys.stderr)


def written(*paths: Path) -> None:
    """Print on stderr which files were written: stdout is for the answer."""
    for path in paths:
        size = path.stat().st_size
        size_text = f"{size / 2**20:,.1f} MiB" if size >= 1 << 20 else f"{size / 2**10:,.1f} KiB"
        print(f"{no_command(printable(str(path), None))}  {size_text}", file=sys.stderr)


@contextmanager
def progress_bar(output_format: Format) -> Iterator["Progress | None"]:
    """A bar on stderr while a run computes; nothing if stderr is not a terminal or the answer is for machines."""
    if output_format is Format.JSON or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(side: str, done: int, total: int | None) -> None:
            if side not in tasks:
                tasks[side] = bar.add_task(side, total=total)
            bar.update(tasks[side], completed=done, total=total)

        yield update


@contextmanager
def waiting(what: str, output_format: Format = Format.TEXT) -> Iterator[None]:
    """A moving bar on stderr that says what a command is doing, where nobody can know how long it takes; shown as `progress_bar` is."""
    with progress_bar(output_format) as progress:
        if progress is not None:
            progress(what, 0, None)
        yield


def print_facts(facts: Mapping[str, Any], output_format: Format) -> None:
    """Named facts, one per line; nested ones indented."""
    if output_format is Format.JSON:
        print(json.dumps({"schema": 1, **facts}))
        return
    for line in _lines(facts, 0):
        print(no_command(line))


def _lines(facts: Mapping[str, Any], indent: int) -> Iterator[str]:
    width = max((len(str(name)) for name in facts), default=0)
    for name, value in facts.items():
        head = " " * indent + printable(str(name))
        if isinstance(value, Mapping):
            yield head
            yield from _lines(value, indent + 2)
        else:
            yield f"{head:<{indent + width}}  {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(printable(str(item)) for item in value) or "none"
    return printable(str(value))


def print_tokens(tokens: "Tokens", output_format: Format) -> None:
    """Ids and pieces, one per line."""
    if output_format is Format.JSON:
        facts = {"ids": list(tokens.ids), "pieces": list(tokens.pieces), "bos": tokens.bos, "eos": tokens.eos}
        print(
            json.dumps({"schema": 1, **facts, "add_bos": tokens.add_bos, "add_eos": tokens.add_eos, "n_vocab": tokens.n_vocab})
        )
        return
    for position, (number, piece) in enumerate(zip(tokens.ids, tokens.pieces, strict=True)):
        print(f"{position:>6}  {number:>8}  {printable(json.dumps(piece, ensure_ascii=False))}")
    added = "added at the start of every prompt" if tokens.add_bos else "not added"
    print(f"{len(tokens.ids)} tokens of a vocabulary of {tokens.n_vocab:,}; BOS {tokens.bos} is {added}")
