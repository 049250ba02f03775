"""The catalogue of faults as a list."""

from collections.abc import Iterator, Sequence

from rich.text import Text

from .layout import labelled


def catalogue_lines(faults: Sequence[tuple[str, str, str, str, str]], width: int) -> Iterator[Text]:
    """The catalogue: group, name, symptom, fix and where it was seen of each fault."""
    group = ""
    for of, name, symptom, fix, seen in faults:
        if of != group:
            yield Text(of, style="bold")
            group = of
        yield Text(f"  {name}")
        yield from labelled([("looks", symptom), ("fix", fix), ("seen in", seen)], width, label=9, indent=4)
