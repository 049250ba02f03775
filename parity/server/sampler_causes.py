"""What a sampler does to llama.cpp's logits: a temperature, truncation, penalties, biases."""

import numpy as np

from checkpoints.answers.server import ServerCause
from checkpoints.printable import printable

from . import penalties
from .base import listed, log_probabilities
from .case import ServerCase, judged
from .truncation import truncations

_TEMPERATURES = (0.05, 20.0)
_PENALTIES = np.concatenate([np.arange(1.01, 1.5, 0.01), np.arange(1.5, 2.01, 0.05), np.arange(0.5, 1.0, 0.05)])


def temperature(case: ServerCase) -> ServerCause | None:
    """Logits that were divided by a temperature: every difference of two candidates is scaled by the same factor."""
    ratios = []
    for placed, row in case.sample:
        server = listed(placed.candidates, case.vocabulary, row)
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
    explained = [case.of(placed, (row / np.float32(temperature)).astype(np.float32)) for placed, row in case.sample]
    sentence = f"the sampler: the log-probabilities are those of logits divided by a temperature of {temperature:.3g}"
    return judged(
        case, "temperature", sentence, "Request those before the sampler, or at temperature 1.", explained, case.sample
    )


def truncation(case: ServerCase) -> ServerCause | None:
    """Probabilities of which only some were kept and made to sum to 1: top-k, top-p, min-p, typical-p, top-n-sigma, XTC or Mirostat."""
    if any(np.isnan(row).any() for _, row in case.sample):
        return None  # llama.cpp's own numbers are none
    offsets, cut = [], []
    for placed, row in case.sample:
        server = case.listed(placed, row)
        keep = server.logprobs > -30
        if keep.any():
            offsets.append(float(np.median(server.logprobs[keep] - log_probabilities(row, server.ids[keep]))))
            cut.append(row)
    if not offsets:
        return None
    fits = []
    for truncated in truncations(cut, offsets):
        explained = [case.of(placed, truncated.left(row)) for placed, row in case.sample]
        wrong = sum(value > case.limit for value in explained)
        fits.append((wrong, float(np.mean(explained)), truncated.what, explained))
    wrong, _, what, explained = min(fits)
    # Rounding moves the edge at single positions: a kind that explains all but one more may be the right one.
    others = sorted(fit for fit in fits if fit[2] != what and fit[0] <= wrong + 1 and fit[0] <= len(explained) / 10)
    kinds = " or ".join([what, *(fit[2] for fit in others)])
    sentence = (
        f"the sampler: the log-probabilities are those after {kinds}, which leaves out tokens and makes the rest sum to 1"
    )
    return judged(case, "truncated-logprobs", sentence, "Request those before the sampler.", explained, case.sample)


def reweighted(case: ServerCase) -> ServerCause | None:
    """Penalties or biases: of those that explain the numbers the closest, since a small one is nearly another's."""
    causes = [cause for find in (penalty, subtracted, biased) if (cause := find(case)) is not None]
    return min(causes, key=lambda cause: cause.kl or 0.0, default=None)


def penalty(case: ServerCase) -> ServerCause | None:
    """A repeat penalty: positive logits of tokens that were seen are divided by it, negative ones multiplied (llama_sampler_penalties)."""

    def worst(penalty: float) -> list[float]:
        return [
            case.of(placed, penalties.repeated(row, case.reply.tokens[: placed.position + 1], penalty))
            for placed, row in case.sample
        ]

    best = min((float(np.mean(worst(float(penalty)))), float(penalty)) for penalty in _PENALTIES)[1]
    sentence = f"the sampler: the log-probabilities are those of logits with a repeat penalty of {best:.2f}"
    return judged(case, "repeat-penalty", sentence, "Request repeat_penalty 1.", worst(best), case.sample)


def subtracted(case: ServerCase) -> ServerCause | None:
    """A presence and a frequency penalty, subtracted from the logits of tokens that were seen."""
    fitted = penalties.subtracted(_seen(case))
    if fitted is None:
        return None
    presence, frequency = fitted
    explained = [
        case.of(placed, penalties.less(row, case.reply.tokens[: placed.position + 1], presence, frequency))
        for placed, row in case.sample
    ]
    sentence = (
        f"the sampler: {presence:.2g} (presence penalty), and {frequency:.2g} for each occurrence (frequency penalty), are subtracted "
        "from the logits of tokens that were seen"
    )
    return judged(case, "penalties", sentence, "Request presence_penalty 0 and frequency_penalty 0.", explained, case.sample)


def biased(case: ServerCase) -> ServerCause | None:
    """A number added to the logits of some tokens at every position."""
    bias = penalties.biases(_seen(case))
    if not bias:
        return None
    explained = [case.of(placed, penalties.with_bias(row, bias)) for placed, row in case.sample]
    shown = ", ".join(
        f"{printable(repr(case.vocabulary.pieces[token]), 20)} {'is banned' if by == penalties.BANNED else f'{by:+.2g}'}"
        for token, by in bias.items()
    )
    sentence = f"the sampler: some tokens' logits are changed at every position: {shown}"
    return judged(case, "logit-bias", sentence, "Request no logit_bias and no banned tokens.", explained, case.sample)


def _seen(case: ServerCase) -> list[penalties.Seen]:
    return [
        penalties.Seen(case.listed(placed, row), row, case.reply.tokens[: placed.position + 1]) for placed, row in case.sample
    ]
