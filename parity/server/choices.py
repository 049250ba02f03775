"""Whether a server chooses its most probable token, as temperature 0 requires; and what else explains its choices."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.server import ServerCause

from .ask import PlacedPrediction
from .base import Row, listed
from .penalties import repeated
from .vocabulary import Vocabulary

_TIE = 1e-3  # log-probability: of two candidates that are closer, either may be chosen
# How far two right engines' log-probabilities differ with quantised weights (0.05 on random Q8_0 models): of tokens that the server
# does not list, only llama.cpp's numbers are known.
_ROUNDING = 0.1
_OF_OFFSET = 0.02  # what such a difference, in the logits' common offset, does to a token under a penalty of 1.3
_PENALTIES = np.arange(1.02, 2.01, 0.02)


def unfaithful(placed: Sequence[PlacedPrediction]) -> tuple[tuple[int, str, str], ...]:
    """(position, the chosen token's text, a better one's) of every choice that is not the most probable of its own candidates."""
    choices = []
    for prediction in placed:
        if prediction.chosen is None or prediction.own is None:
            continue
        own = next((item.logprob for item in prediction.candidates if item.text == prediction.own.text), prediction.own.logprob)
        if prediction.candidates[0].logprob > own + _TIE:
            choices.append((prediction.position, prediction.own.text, prediction.candidates[0].text))
    return tuple(choices)


def cause(
    placed: Sequence[tuple[PlacedPrediction, Row]],
    tokens: Sequence[int],
    wrong: Sequence[tuple[int, str, str]],
    vocabulary: Vocabulary,
) -> ServerCause:
    """Why the server chooses differently: a repeat penalty that explains every choice, several of them wrong, else another sampler."""
    position, chosen, better = wrong[0]
    first = (
        f"the sampler: at {len(wrong)} of {len(placed)} steps it chose another token than its own most probable one, "
        f"first {chosen!r} instead of {better!r} at position {position}"
    )
    steps = [_Step.of(item, row, tokens[: item.position + 1], vocabulary) for item, row in placed]
    fits, span = _fitting(steps), ""
    if fits:
        span = _span(fits)
    else:  # llama-cpp-python's server penalises only what it chose itself
        prompt = placed[0][0].position + 1
        fits = _fitting([replace(step, before=step.before[prompt:]) for step in steps])
        span = f"{_span(fits)} on the tokens that it chose" if fits else ""
    if fits and len(wrong) > 1:
        places = {place for place, _, _ in wrong}
        dry = all(step.repeats for step, (item, _) in zip(steps, placed, strict=True) if item.position in places)
        also = "; so may DRY, since each token that was passed over continues a repetition" if dry else ""
        return ServerCause(
            "repeat-penalty",
            f"{first}; a repeat penalty of {span} explains every choice{also}",
            "Turn it off: --server-json '{\"repeat_penalty\": 1}'.",
            tried=len(placed),
        )
    if fits:
        sentence = f"{first}, although temperature 0 was requested; a repeat penalty of {span} would explain this one choice, as others may"
    else:
        sentence = (
            f"{first}; no repeat penalty explains that: it samples, or changes its numbers before it chooses, although temperature 0 "
            "was requested"
        )
    advice = "Check whether the server sets a temperature, a seed, a penalty (DRY, too), a bias or typical-p itself."
    return ServerCause("sampler", sentence, advice, tried=len(placed))


def _fitting(steps: Sequence["_Step"]) -> list[float]:
    """The repeat penalties that explain every choice."""
    return [float(penalty) for penalty in _PENALTIES if all(step.explained_by(float(penalty)) for step in steps)]


def _span(fits: Sequence[float]) -> str:
    return f"{fits[0]:.2f}" if len(fits) == 1 else f"{fits[0]:.2f} to {fits[-1]:.2f}"


class _Step(Struct, frozen=True):
    """One choice: llama.cpp's logits [V] with the server's own numbers where it gives them, at `known` ids; the tokens before it."""

    row: Row
    known: NDArray[np.int64]
    chosen: int | None
    before: Sequence[int]

    @staticmethod
    def of(item: PlacedPrediction, row: Row, before: Sequence[int], vocabulary: Vocabulary) -> "_Step":
        """The server's log-probabilities become logits by the median of what llama.cpp's are above them."""
        server = listed(item.candidates, vocabulary, row)
        known, given = server.ids, server.logprobs
        if item.own is not None and item.chosen is not None and item.chosen not in known:
            known, given = np.append(known, item.chosen), np.append(given, item.own.logprob)
        both = row.copy()
        if len(given):
            both[known] = (given + float(np.median(row[known] - given))).astype(np.float32)
        return _Step(both, known.astype(np.int64), item.chosen, before)

    def explained_by(self, penalty: float) -> bool:
        """Whether this repeat penalty makes the chosen token the most probable one."""
        if self.chosen is None or not len(self.known):
            return False
        after = repeated(self.row, self.before, penalty)
        reached = float(after[self.chosen])
        return float(after[self.known].max()) - reached <= _OF_OFFSET and float(after.max()) - reached <= _ROUNDING

    @property
    def repeats(self) -> bool:
        """Whether the server's most probable token followed the last one before: what DRY makes less probable."""
        best = int(self.known[np.argmax(self.row[self.known])])
        return any(pair == (self.before[-1], best) for pair in pairwise(self.before))
