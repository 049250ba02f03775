"""Text from outside (files, models, engines, arguments), made safe to print: one function for every printer."""

from collections.abc import Collection, Sequence
from itertools import islice

LONGEST = 300  # characters of one name or value: more is not useful to anybody


def printable(text: str, limit: int | None = LONGEST) -> str:
    """The text on one line, without anything that a terminal would obey or hide, cut after `limit` characters (None: not cut).

    Control characters, line breaks, marks that change the direction of writing and halves of characters become U+FFFD.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return text if text.isprintable() else "".join(char if char.isprintable() else "\ufffd" for char in text)


def no_command(line: str) -> str:
    """A printed line that GitHub's runner does not take for one of its commands: "::name::" at the start, or "##[name]" anywhere."""
    line = line.replace("##[", "##(")
    return f"\\{line}" if line.lstrip().startswith("::") else line


def first_names(names: Collection[str], most: int = 4) -> str:
    """The first of some names, and "…" if there are more: "a, b, c, d, …"."""
    return ", ".join([*islice(names, most), *["…"] * (len(names) > most)])


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else "".join(names)
