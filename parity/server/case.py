"""The data in which a cause of a server's numbers is looked for, and the rule by which a reading of them counts as one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace

from checkpoints.answers.server import ServerCause
from reference.client import Reference
from reference.jobs import Tokens

from ..run.request import Prompt
from ..score.measures import Listed
from . import numbers
from .ask import PlacedPrediction, ServerReply
from .base import Row, kl, listed, log_probabilities
from .vocabulary import Vocabulary

_ENOUGH = 0.9  # share of the sample that must be explained: single positions are amplified (docs/your-engine.md)
_BETTER = 10.0  # how many times closer than the unchanged text an explanation must be


class ServerCase(Struct, frozen=True):
    """Everything needed to look for a cause: `sample` has llama.cpp's rows [V], `limit` is a KL; `notes` say what was not tried."""

    reference: Reference
    model: Path
    mode: str
    prompt: Prompt
    reply: ServerReply
    special: Tokens
    vocabulary: Vocabulary
    sample: tuple[tuple[PlacedPrediction, Row], ...]
    limit: float
    notes: list[str] = field(default_factory=list)

    def without(self, sample: Sequence[tuple[PlacedPrediction, Row]]) -> float:
        """The worst KL of these predictions, read as they were asked for."""
        return max(self.of(placed, row) for placed, row in sample)

    def of(self, placed: PlacedPrediction, row: Row) -> float:
        """KL of one prediction from this row of llama.cpp's."""
        return kl(row, self.listed(placed, row))

    def listed(self, placed: PlacedPrediction, row: Row) -> Listed:
        """The server's numbers of one prediction, by token."""
        return listed(placed.candidates, self.vocabulary, row)

    def meant(self, placed: PlacedPrediction, row: Row, meaning: numbers.Meaning) -> float:
        """KL of one prediction, with the server's numbers read in this way."""
        server = self.listed(placed, row)
        return kl(row, replace(server, logprobs=meaning.natural(server.logprobs, log_probabilities(row, server.ids))))


def judged(
    case: ServerCase,
    name: str,
    sentence: str,
    advice: str,
    explained: Sequence[float],
    sample: Sequence[tuple[PlacedPrediction, Row]],
) -> ServerCause | None:
    """The cause, if it explains enough of the sample and the unchanged request does not."""
    if not explained:
        return None
    unchanged = [case.of(placed, row) for placed, row in sample]
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
