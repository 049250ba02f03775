"""The first lines of an answer: the model, the tokens and both sides."""

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.text import Text

from checkpoints.printable import no_command, printable
from checkpoints.record import Header

from .layout import labelled
from .numbers import clean, count


def print_lines(console: Console, lines: Iterator[Text] | list[Text]) -> None:
    """Print lines as they are: nothing is wrapped, highlighted or read as markup, by a terminal or by GitHub's runner."""
    for line in lines:
        console.print(_harmless(line), highlight=False, soft_wrap=True)


def _harmless(line: Text) -> Text:
    plain = no_command(printable(line.plain, None))
    if plain == line.plain:
        return line
    kept = line.copy()
    if len(plain) > len(kept.plain):
        kept = Text("\\").append_text(kept)
    kept.plain = plain
    return kept


def print_header(
    console: Console,
    ours: Header | None,
    ref: Header | None,
    generated: str = "",
    more: Mapping[str, Header | None] | None = None,
    names: tuple[str, str] = ("ours", "ref"),
) -> None:
    """Print which model, tokens and sides are compared, `more` sides by their names, and the text that the reference wrote."""
    print_lines(console, header(ours, ref, console.width, generated, more, names))


def header(
    ours: Header | None,
    ref: Header | None,
    width: int,
    generated: str = "",
    more: Mapping[str, Header | None] | None = None,
    names: tuple[str, str] = ("ours", "ref"),
) -> list[Text]:
    """These lines; none if neither side has a header."""
    rows = list(facts(ref or ours, {names[0]: ours, names[1]: ref, **(more or {})}))
    if generated:
        rows.append(("wrote", printable(generated, None)))
    return [*labelled(rows, width), Text("")] if rows else []


def facts(either: Header | None, sides: Mapping[str, Header | None]) -> Iterator[tuple[str, str]]:
    """(name, text) of model and tokens, from the header of `either` side, and of each of the `sides`; nothing without a header."""
    if either is None:
        return
    model = either.model
    shape = ", ".join(
        part for part in (clean(model.architecture), count(model.layers, "layer") if model.layers else "") if part
    )
    named = " · ".join(part for part in (clean(model.name), shape, clean(model.file_type)) if part)
    if named:
        yield "model", named
    if either.tokens:
        pieces = printable("".join(either.pieces), 1000)
        text = f"{len(either.tokens)}  {pieces if len(pieces) <= 60 else pieces[:59] + '…'}"
        yield "tokens", text.rstrip()
    for name, side in sides.items():
        if side is not None:
            yield name, _side(side)
        else:
            yield name, "no header: source, model and arithmetic are not known"


def _side(side: Header) -> str:
    build = side.build
    version = build.get("version") or build.get("llama_cpp_python")
    threads = build.get("threads")
    parts = [
        " ".join(clean(str(part)) for part in (side.source, version) if part),
        clean(str(build.get("device") or build.get("backend") or "")),
        count(threads, "thread") if isinstance(threads, int) else "",
        clean(str(build.get("weights") or side.compute)),
        f"KV {clean(side.kv_type)}" if side.kv_type else "",
    ]
    return " · ".join(part for part in parts if part)
