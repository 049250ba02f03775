"""Explanations of a server's numbers: the same text read in another way, numbers of another kind, or logits changed by a sampler."""

from collections.abc import Callable

from checkpoints.answers.server import ServerCause

from ..score.measures import log_sum
from . import numbers
from .base import log_probabilities
from .case import ServerCase, judged
from .predictions import may_be_logarithm
from .sampler_causes import reweighted, temperature, truncation
from .text_causes import beginning, echo, template, tokenizer


def cause_of(case: ServerCase) -> ServerCause | None:
    """The first reading that explains the predictions, if one does.

    Numbers that cannot be log-probabilities are looked at as such only: no other text and no sampler makes them (and all chat templates
    take a pass each).
    """
    readings: tuple[Callable[[ServerCase], ServerCause | None], ...] = (
        echo, _numbers, beginning, temperature, truncation, _not_normalised, reweighted, template, tokenizer,
    )  # fmt: skip
    if not all(may_be_logarithm(candidate) for placed, _ in case.sample for candidate in placed.candidates):
        readings = (echo, _numbers, _not_normalised)
    return next((cause for find in readings if (cause := find(case)) is not None), None)


def unexplained(predictions: int, same: int) -> str:
    """A note on numbers that no reading explains, though both sides choose alike at `same` of the predictions; "" if they do not."""
    if 2 * same < predictions:
        return ""
    return (
        f"nothing that was tried explains the numbers (another text, numbers, sampler), but the first choices are the same at {same} of "
        f"{predictions}: as of other weights, such as another quantisation or an adapter, or of another arithmetic"
    )


def _not_normalised(case: ServerCase) -> ServerCause | None:
    """Log-probabilities that are off by another constant at each position."""
    listed = [case.listed(placed, row) for placed, row in case.sample]
    ours = [log_probabilities(row, server.ids) for (_, row), server in zip(case.sample, listed, strict=True)]
    meaning = numbers.unnormalised([server.logprobs for server in listed], ours) if numbers.tells(ours) else None
    if meaning is None:
        return None
    explained = [case.meant(placed, row, meaning) for placed, row in case.sample]
    return judged(case, meaning.name, meaning.sentence, numbers.advice(meaning), explained, case.sample)


def _numbers(case: ServerCase) -> ServerCause | None:
    """Numbers that are something other than natural log-probabilities."""
    listed = [case.listed(placed, row) for placed, row in case.sample]
    ours = [log_probabilities(row, server.ids) for (_, row), server in zip(case.sample, listed, strict=True)]
    if not numbers.tells(ours):
        return None
    sums = [log_sum(row) for _, row in case.sample]
    for meaning in numbers.meanings([server.logprobs for server in listed], ours, sums):
        explained = [case.meant(placed, row, meaning) for placed, row in case.sample]
        if cause := judged(case, meaning.name, meaning.sentence, numbers.advice(meaning), explained, case.sample):
            return cause
    return None
