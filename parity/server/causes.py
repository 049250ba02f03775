"""Explanations of a server's numbers: the same text read in another way, or llama.cpp's logits changed by a sampler."""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace

from checkpoints.answers.server import ServerCause
from checkpoints.printable import printable
from reference.client import Reference
from reference.jobs import Tokens

from ..run.request import Prompt
from ..score.measures import Listed, log_sum
from . import numbers, penalties
from .ask import Asked, Heard
from .base import Row, kl, listed, log_probabilities, rows
from .predictions import may_be_logarithm
from .truncation import truncations
from .vocabulary import Vocabulary

_SAMPLE = 12  # predictions on which a reading is tried
_TEMPLATED = 3  # predictions on which a chat template is tried: each takes a pass of its own
_BUDGET = 60.0  # seconds for all chat templates (some fifty), as long as `parity explain` searches
_ENOUGH = 0.9  # share of the sample that must be explained: single positions are amplified (docs/your-engine.md)
_BETTER = 10.0  # how many times closer than the unchanged text an explanation must be
_TEMPERATURES = (0.05, 20.0)
_PENALTIES = np.concatenate([np.arange(1.01, 1.5, 0.01), np.arange(1.5, 2.01, 0.05), np.arange(0.5, 1.0, 0.05)])


class ServerCase(Struct, frozen=True):
    """Everything needed to look for a cause: `sample` has llama.cpp's rows [V], `limit` is a KL; `notes` say what was not tried."""

    reference: Reference
    model: Path
    mode: str
    prompt: Prompt
    heard: Heard
    special: Tokens
    vocabulary: Vocabulary
    sample: tuple[tuple[Asked, Row], ...]
    limit: float
    notes: list[str] = field(default_factory=list)

    def without(self, sample: Sequence[tuple[Asked, Row]]) -> float:
        """The worst KL of these predictions, read as they were asked for."""
        return max(self.of(asked, row) for asked, row in sample)

    def of(self, asked: Asked, row: Row) -> float:
        """KL of one prediction, if llama.cpp's row is this one."""
        return kl(row, self.listed(asked, row))

    def listed(self, asked: Asked, row: Row) -> Listed:
        """The server's numbers of one prediction, by tokens."""
        return listed(asked.candidates, self.vocabulary, row)

    def meant(self, asked: Asked, row: Row, meaning: numbers.Meaning) -> float:
        """KL of one prediction, if the server's numbers are to be read this way."""
        server = self.listed(asked, row)
        return kl(row, replace(server, logprobs=meaning.natural(server.logprobs, log_probabilities(row, server.ids))))


MORE = 8  # predictions beyond the sample that are kept because they are wrong


def sampled(asked: Sequence[Asked]) -> tuple[Asked, ...]:
    """Predictions spread over all that were asked for."""
    count = min(_SAMPLE, len(asked))
    return tuple(asked[number * len(asked) // count] for number in range(count))


def cause_of(case: ServerCase) -> ServerCause | None:
    """The first reading that explains the predictions, if one does.

    Numbers that cannot be log-probabilities are looked at as such only: no other text and no sampler makes them (and all chat templates
    take a pass each).
    """
    readings: tuple[Callable[[ServerCase], ServerCause | None], ...] = (
        _echo, _numbers, _beginning, _temperature, _truncation, _not_normalised, _penalty, _subtracted, _biased, _template, _tokenizer,
    )  # fmt: skip
    if not all(may_be_logarithm(candidate) for asked, _ in case.sample for candidate in asked.candidates):
        readings = (_echo, _numbers, _not_normalised)
    return next((cause for find in readings if (cause := find(case)) is not None), None)


def unexplained(predictions: int, same: int) -> str:
    """A note on numbers that no reading explains, though both sides choose alike at `same` of the predictions; "" if they do not."""
    if 2 * same < predictions:
        return ""
    return (
        f"nothing that was tried explains the numbers (another text, numbers, sampler), but the first choices are the same at {same} of "
        f"{predictions}: as of other weights, such as another quantisation or an adapter, or of another arithmetic"
    )


def _echo(case: ServerCase) -> ServerCause | None:
    if case.heard.around is None:
        return None
    before, behind = (printable(repr(text), 80) for text in case.heard.around)
    return ServerCause(
        "template",
        f"the server does not complete the text as given: its echo has {before} before it and {behind} after it",
        "Turn off the chat template for completions, or give both sides the whole text.",
    )


def _not_normalised(case: ServerCase) -> ServerCause | None:
    """Log-probabilities that are off by another constant at each position."""
    listed = [case.listed(asked, row) for asked, row in case.sample]
    ours = [log_probabilities(row, server.ids) for (_, row), server in zip(case.sample, listed, strict=True)]
    meaning = numbers.unnormalised([server.logprobs for server in listed], ours) if numbers.tells(ours) else None
    if meaning is None:
        return None
    explained = [case.meant(asked, row, meaning) for asked, row in case.sample]
    return _judged(case, meaning.name, meaning.sentence, numbers.advice(meaning), explained, case.sample)


def _numbers(case: ServerCase) -> ServerCause | None:
    """Numbers that are something other than natural log-probabilities."""
    listed = [case.listed(asked, row) for asked, row in case.sample]
    ours = [log_probabilities(row, server.ids) for (_, row), server in zip(case.sample, listed, strict=True)]
    if not numbers.tells(ours):
        return None
    sums = [log_sum(row) for _, row in case.sample]
    for meaning in numbers.meanings([server.logprobs for server in listed], ours, sums):
        explained = [case.meant(asked, row, meaning) for asked, row in case.sample]
        if cause := _judged(case, meaning.name, meaning.sentence, numbers.advice(meaning), explained, case.sample):
            return cause
    return None


def _tokenizer(case: ServerCase) -> ServerCause | None:
    if case.heard.tokenizer is None:
        return None
    position, our_text, server_text = case.heard.tokenizer
    if case.heard.cut is not None:
        return ServerCause(
            "truncated",
            f"the server reads only the beginning of the text: its echo ends after {case.heard.cut:,} characters",
            "Check the server's limit of the prompt's length, and its context.",
        )
    return ServerCause(
        "tokenizer",
        f"the server's tokens differ from position {position} on: llama.cpp has {printable(repr(our_text), 40)}, the server "
        f"{printable(repr(server_text), 40)}",
        "Compare vocabularies and pre-tokenizers; `parity tokens` shows llama.cpp's.",
    )


def _judged(
    case: ServerCase, name: str, sentence: str, advice: str, explained: Sequence[float], sample: Sequence[tuple[Asked, Row]]
) -> ServerCause | None:
    """The cause, if it explains enough of the sample and the unchanged request does not."""
    if not explained:
        return None
    unchanged = [case.of(asked, row) for asked, row in sample]
    # The closest of many readings; `limit` covers the noise of a sampler's or a quantised server's numbers.
    if sum(value <= case.limit for value in explained) < _ENOUGH * len(explained):
        return None
    if len(explained) == len(sample):
        wrong = [after for before, after in zip(unchanged, explained, strict=True) if before > case.limit]
        if sum(value <= case.limit for value in wrong) < _ENOUGH * len(wrong):
            return None  # it leaves alone what is wrong: most of the sample was right before
    if not max(unchanged) > _BETTER * float(np.median(explained)):
        return None
    return ServerCause(name, sentence, advice, max(explained), max(unchanged), len(explained))


def _readings(case: ServerCase, ids: Sequence[int], moved: int) -> dict[int, list[float]]:
    """KL of the sampled predictions if the server reads `ids`, in which each position is moved by `moved`: for log-probabilities at
    their own position (0), one token too early (1) or too late (-1).
    """
    readings: dict[int, list[float]] = {0: [], 1: [], -1: []}
    sample = {asked.position + moved: asked for asked, _ in case.sample}
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


def _beginning(case: ServerCase) -> ServerCause | None:
    """A BOS that is missing, doubled or superfluous, or log-probabilities that are listed one token off."""
    ids, bos = case.heard.tokens, case.special.bos
    variants = [("", tuple(ids), 0, "", "")]
    if bos is not None:
        counted = case.heard.prompt_tokens
        says = f", and says that the prompt has {counted} tokens" if counted is not None else ""
        where = f"({printable(case.vocabulary.pieces[bos], 30)}) before the text{says}"
        flag = "as the file's add_bos_token says"
        if ids[:1] == (bos,):
            doubled = "Add it in one place only: the tokenizer or the template."
            variants += [
                ("bos-missing", ids[1:], -1, f"the server reads no BOS {where}", f"Add it, {flag}."),
                ("bos-doubled", (bos, *ids), 1, f"the server reads two BOS {where}", doubled),
            ]
        else:
            variants.append(("bos-added", (bos, *ids), 1, f"the server reads a BOS {where}", f"Leave it out, {flag}."))
    readings = [(variant, _readings(case, variant[1], variant[2])) for variant in variants if variant[1]]
    for shift, how in _SHIFTED.items():
        for (name, _, _, sentence, advice), explained in readings:
            if not name and not shift:
                continue  # the unchanged request
            words = "; ".join(filter(None, (sentence, how)))
            advice_text = " ".join(filter(None, (advice, "Logits at position t predict token t + 1." if shift else "")))
            if cause := _judged(case, name or "shifted", words, advice_text, explained[shift], case.sample):
                return cause
    return None


def _temperature(case: ServerCase) -> ServerCause | None:
    """Logits that were divided by a temperature: every difference of two candidates is scaled by the same factor."""
    ratios = []
    for asked, row in case.sample:
        server = listed(asked.candidates, case.vocabulary, row)
        keep = np.isfinite(server.logprobs) & (server.logprobs > -30)
        ids, logprobs = server.ids[keep], server.logprobs[keep]
        if len(ids) > 1:
            ours = row[ids].astype(np.float64)
            ratios.append(
                float(np.median((logprobs[1:] - logprobs[0]) / np.where(ours[1:] == ours[0], np.nan, ours[1:] - ours[0])))
            )
    if not ratios or not np.isfinite(ratios).all() or np.median(ratios) <= 0:
        return None
    temperature = 1 / float(np.median(ratios))
    if not _TEMPERATURES[0] < temperature < _TEMPERATURES[1]:
        return None
    explained = [case.of(asked, (row / np.float32(temperature)).astype(np.float32)) for asked, row in case.sample]
    sentence = f"the sampler: the log-probabilities are those of logits divided by a temperature of {temperature:.3g}"
    return _judged(
        case, "temperature", sentence, "Request those before the sampler, or at temperature 1.", explained, case.sample
    )


def _truncation(case: ServerCase) -> ServerCause | None:
    """Probabilities of which only the largest were kept and made to sum to 1: top-k, top-p, min-p."""
    offsets, cut = [], []
    for asked, row in case.sample:
        server = case.listed(asked, row)
        keep = server.logprobs > -30
        if keep.any():
            offsets.append(float(np.median(server.logprobs[keep] - log_probabilities(row, server.ids[keep]))))
            cut.append(row)
    if not offsets:
        return None
    fits = []
    for truncated in truncations(cut, offsets):
        explained = [case.of(asked, truncated.left(row)) for asked, row in case.sample]
        sentence = (
            f"the sampler: the log-probabilities are those behind {truncated.what}, "
            "which leaves out all other tokens and makes the rest sum to 1"
        )
        fits.append((sentence, explained))
    sentence, explained = min(fits, key=lambda fit: float(np.median(fit[1])))
    return _judged(case, "truncated-logprobs", sentence, "Request those before the sampler.", explained, case.sample)


def _penalty(case: ServerCase) -> ServerCause | None:
    """A repeat penalty: positive logits of tokens that were seen are divided by it, negative ones multiplied (llama_sampler_penalties)."""

    def worst(penalty: float) -> list[float]:
        return [
            case.of(asked, penalties.repeated(row, case.heard.tokens[: asked.position + 1], penalty))
            for asked, row in case.sample
        ]

    best = min((float(np.mean(worst(float(penalty)))), float(penalty)) for penalty in _PENALTIES)[1]
    sentence = f"the sampler: the log-probabilities are those of logits with a repeat penalty of {best:.2f}"
    return _judged(case, "repeat-penalty", sentence, "Request repeat_penalty 1.", worst(best), case.sample)


def _subtracted(case: ServerCase) -> ServerCause | None:
    """A presence and a frequency penalty, subtracted from the logits of tokens that were seen."""
    fitted = penalties.subtracted(_seen(case))
    if fitted is None:
        return None
    presence, frequency = fitted
    explained = [
        case.of(asked, penalties.less(row, case.heard.tokens[: asked.position + 1], presence, frequency))
        for asked, row in case.sample
    ]
    sentence = (
        f"the sampler: from the logits of tokens that were seen are subtracted {presence:.2g} (presence penalty) and {frequency:.2g} "
        "for each time (frequency penalty)"
    )
    return _judged(case, "penalties", sentence, "Request presence_penalty 0 and frequency_penalty 0.", explained, case.sample)


def _biased(case: ServerCase) -> ServerCause | None:
    """A number added to the logits of some tokens at every position."""
    bias = penalties.biases(_seen(case))
    if not bias:
        return None
    explained = [case.of(asked, penalties.with_bias(row, bias)) for asked, row in case.sample]
    shown = ", ".join(
        f"{printable(repr(case.vocabulary.pieces[token]), 20)} {'is banned' if by == penalties.BANNED else f'{by:+.2g}'}"
        for token, by in bias.items()
    )
    sentence = f"the sampler: some tokens' logits are changed at every position: {shown}"
    return _judged(case, "logit-bias", sentence, "Request no logit_bias and no banned tokens.", explained, case.sample)


def _seen(case: ServerCase) -> list[penalties.Seen]:
    return [penalties.Seen(case.listed(asked, row), row, case.heard.tokens[: asked.position + 1]) for asked, row in case.sample]


def _template(case: ServerCase) -> ServerCause | None:
    """A chat template around the text: each position that was asked for by its own text is tried as a user's message."""
    asked = [
        (item, row) for item, row in case.sample if item.chosen is None and (item.prefix is not None or _at_end(case, item))
    ]
    asked = asked[-_TEMPLATED:]
    if not asked or case.prompt.text is None:
        return None
    last = asked[-1][0]
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
        if case.heard.prompt_tokens is not None and _at_end(case, last) and abs(len(ids) - case.heard.prompt_tokens) > 1:
            continue
        if case.of(last, _last_row(case, ids)) > case.limit:
            continue
        explained = [case.of(item, _last_row(case, _wrapped(case, item, name))) for item, _ in asked]
        which = "the file's own chat template" if name == "own" else f"the chat template {name!r}"
        sentence = f"the server puts {which} around the text: it reads {printable(repr(wrapped), 120)}"
        advice = "Turn off the chat template for completions, or give both sides the whole text."
        if cause := _judged(case, "template", sentence, advice, explained, asked):
            return cause
    return None


def _at_end(case: ServerCase, asked: Asked) -> bool:
    return asked.position == case.heard.prompt - 1


def _wrapped(case: ServerCase, asked: Asked, name: str) -> Sequence[int]:
    text = asked.prefix if asked.prefix is not None else case.prompt.text or ""
    return case.reference.tokenize(case.model, case.reference.chat_texts(case.model, text)[name]).ids


def _last_row(case: ServerCase, ids: Sequence[int]) -> Row:
    return [row for _, row in rows(case.reference, case.model, ids, len(ids) - 1, case.mode)][-1]
