"""Whether a server chooses its most probable token, as temperature 0 requires; and what else explains its choices."""

from collections.abc import Sequence

import numpy as np

from checkpoints.answers.server import ServerCause

from .ask import PlacedPrediction
from .base import Row
from .penalties import repeated

_TIE = 1e-3  # log-probability: of two candidates that are closer, either may be chosen
# How far two right engines' log-probabilities differ with quantised weights (0.05 on random Q8_0 models): with a penalty the
# chosen token is llama.cpp's first, or this close to it.
_ROUNDING = 0.1
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
    placed: Sequence[tuple[PlacedPrediction, Row]], tokens: Sequence[int], wrong: Sequence[tuple[int, str, str]]
) -> ServerCause:
    """Why the server chooses differently: a repeat penalty that explains every choice, else a sampler that is not greedy."""
    position, chosen, better = wrong[0]
    first = (
        f"the sampler: at {len(wrong)} of {len(placed)} steps it chose another token than its own most probable one, "
        f"first {chosen!r} instead of {better!r} at position {position}"
    )
    fits = [
        float(penalty)
        for penalty in _PENALTIES
        if all(_chooses(repeated(row, tokens[: item.position + 1], float(penalty)), item.chosen) for item, row in placed)
    ]
    if fits:
        span = f"{fits[0]:.2f}" if len(fits) == 1 else f"{fits[0]:.2f} to {fits[-1]:.2f}"
        return ServerCause(
            "repeat-penalty",
            f"{first}; a repeat penalty of {span} explains every choice",
            "Turn it off: --server-json '{\"repeat_penalty\": 1}'.",
            tried=len(placed),
        )
    return ServerCause(
        "sampler",
        f"{first}; no repeat penalty explains that: it samples, although temperature 0 was requested",
        "Check whether the server sets a temperature, a seed or a penalty itself.",
        tried=len(placed),
    )


def _chooses(row: Row, chosen: int | None) -> bool:
    return chosen is not None and float(row.max() - row[chosen]) <= _ROUNDING
