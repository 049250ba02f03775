"""Another text than the one that was sent: a BOS more or less, a chat template, another tokenizer, positions one token off."""

from collections.abc import Sequence
from time import monotonic

from checkpoints.answers.server import ServerCause
from checkpoints.printable import printable

from .ask import PlacedPrediction
from .base import Row, rows
from .case import ServerCase, judged

_TEMPLATED = 3  # predictions on which a chat template is tried: each takes a pass of its own
_BUDGET = 60.0  # seconds for all chat templates (some fifty), as long as `parity explain` searches


def echo(case: ServerCase) -> ServerCause | None:
    """Text that the server's echo has around the prompt."""
    if case.reply.around is None:
        return None
    before, after = (printable(repr(text), 80) for text in case.reply.around)
    return ServerCause(
        "template",
        f"the server does not complete the text as given: its echo has {before} before it and {after} after it",
        "Turn off the chat template for completions, or give both sides the whole text.",
    )


def tokenizer(case: ServerCase) -> ServerCause | None:
    """Other tokens of the same text, or the beginning of the text only."""
    if case.reply.tokenizer is None:
        return None
    position, our_text, server_text = case.reply.tokenizer
    if case.reply.cut is not None:
        return ServerCause(
            "truncated",
            f"the server reads only the beginning of the text: its echo ends after {case.reply.cut:,} characters",
            "Check the server's limit of the prompt's length, and its context.",
        )
    return ServerCause(
        "tokenizer",
        f"the server's tokens differ from position {position} on: llama.cpp has {printable(repr(our_text), 40)}, the server "
        f"{printable(repr(server_text), 40)}",
        "Compare vocabularies and pre-tokenizers; `parity tokens` shows llama.cpp's.",
    )


def _readings(case: ServerCase, ids: Sequence[int], moved: int) -> dict[int, list[float]]:
    """KL of the sampled predictions if the server reads `ids`, in which each position is moved by `moved`: for log-probabilities at
    their own position (0), one token too early (1) or too late (-1).
    """
    readings: dict[int, list[float]] = {0: [], 1: [], -1: []}
    sample = {placed.position + moved: placed for placed, _ in case.sample}
    for position, row in rows(case.reference, case.model, ids, 0, case.mode):
        for shift, values in readings.items():
            if position - shift in sample:
                values.append(case.of(sample[position - shift], row))
    return readings


_SHIFTED = {
    0: "",
    1: "each position has the log-probabilities of the next one: they come one token too early",
    -1: "each position has the log-probabilities of the previous one: they come one token too late",
}


def beginning(case: ServerCase) -> ServerCause | None:
    """A BOS that is missing, doubled or superfluous, or log-probabilities that are listed one token off."""
    ids, bos = case.reply.tokens, case.special.bos
    variants = [("", tuple(ids), 0, "", "")]
    if bos is not None:
        counted = case.reply.prompt_tokens
        says = f", and says that the prompt has {counted} tokens" if counted is not None else ""
        where = f"({printable(case.vocabulary.pieces[bos], 30)}) before the text{says}"
        as_the_file_says = "as the file's add_bos_token says"
        if ids[:1] == (bos,):
            doubled = "Add it in one place only: the tokenizer or the template."
            variants += [
                ("bos-missing", ids[1:], -1, f"the server reads no BOS {where}", f"Add it, {as_the_file_says}."),
                ("bos-doubled", (bos, *ids), 1, f"the server reads two BOS {where}", doubled),
            ]
        else:
            variants.append(
                ("bos-added", (bos, *ids), 1, f"the server reads a BOS {where}", f"Leave it out, {as_the_file_says}.")
            )
    readings = [(variant, _readings(case, variant[1], variant[2])) for variant in variants if variant[1]]
    for shift, how in _SHIFTED.items():
        for (name, _, _, sentence, advice), explained in readings:
            if not name and not shift:
                continue  # the unchanged request
            words = "; ".join(filter(None, (sentence, how)))
            advice_text = " ".join(filter(None, (advice, "Logits at position t predict token t + 1." if shift else "")))
            if cause := judged(case, name or "shifted", words, advice_text, explained[shift], case.sample):
                return cause
    return None


def template(case: ServerCase) -> ServerCause | None:
    """A chat template around the text: each position that was asked for by its own text is tried as a user's message."""
    placed = [
        (item, row) for item, row in case.sample if item.chosen is None and (item.prefix is not None or _at_end(case, item))
    ]
    placed = placed[-_TEMPLATED:]
    if not placed or case.prompt.text is None or all(_same_choice(case, item, row) for item, row in placed):
        return None  # other weights, or another arithmetic: the answer of an assistant goes on in another way than the text
    last = placed[-1][0]
    text = last.prefix if last.prefix is not None else case.prompt.text
    deadline = monotonic() + _BUDGET
    templates = case.reference.chat_texts(case.model, text)
    for number, (name, wrapped) in enumerate(templates.items()):
        if monotonic() > deadline:
            case.notes.append(
                f"the search for a chat template ended after {_BUDGET:g} seconds: {number} of {len(templates)} were tried"
            )
            return None
        ids = case.reference.tokenize(case.model, wrapped).ids
        if case.reply.prompt_tokens is not None and _at_end(case, last) and abs(len(ids) - case.reply.prompt_tokens) > 1:
            continue
        if case.of(last, _last_row(case, ids)) > case.limit:
            continue
        explained = [case.of(item, _last_row(case, _wrapped(case, item, name))) for item, _ in placed]
        which = "the file's own chat template" if name == "own" else f"the chat template {name!r}"
        sentence = f"the server puts {which} around the text: it reads {printable(repr(wrapped), 120)}"
        advice = "Turn off the chat template for completions, or give both sides the whole text."
        if cause := judged(case, "template", sentence, advice, explained, placed):
            return cause
    return None


def _same_choice(case: ServerCase, item: PlacedPrediction, row: Row) -> bool:
    """Whether the server's first choice is the one that llama.cpp has for the text as it was sent."""
    server = case.listed(item, row)
    return len(server.ids) > 0 and int(server.ids[server.logprobs.argmax()]) == int(row.argmax())


def _at_end(case: ServerCase, placed: PlacedPrediction) -> bool:
    return placed.position == case.reply.prompt - 1


def _wrapped(case: ServerCase, placed: PlacedPrediction, name: str) -> Sequence[int]:
    text = placed.prefix if placed.prefix is not None else case.prompt.text or ""
    return case.reference.tokenize(case.model, case.reference.chat_texts(case.model, text)[name]).ids


def _last_row(case: ServerCase, ids: Sequence[int]) -> Row:
    return [row for _, row in rows(case.reference, case.model, ids, len(ids) - 1, case.mode)][-1]
