"""The truth about an encoder–decoder: the encoder's steps over the prompt, the decoder's over its own tokens, each in float64."""

from collections.abc import Mapping, Sequence
from functools import cached_property

from checkpoints.points import ENCODER
from checkpoints.record import Rows
from engine.graph import ENCODED, alone
from engine.replay.wide import coarse_points
from engine.transformer import Transformer

from .arbiter import Arbiter, Floats


class EncoderDecoderArbiter:
    """Knows the truth about a prompt that an encoder reads and the tokens that a decoder generates from it.

    Args:
        transformer: an encoder–decoder.
        prompt, generated: ids of the encoder's tokens, and of the decoder's tokens after its first one.
    """

    def __init__(self, transformer: Transformer, prompt: Sequence[int], generated: Sequence[int]) -> None:
        steps = transformer.encoder or ()
        computed = transformer.weights, transformer.backend
        self._last = steps[-1].makes
        self._encoder = Arbiter(alone(steps), *computed, prompt, range(len(prompt)), [0] * len(prompt))
        tokens = (transformer.decoder_start or 0, *generated)
        numbers = range(len(tokens))
        self._decoder = Arbiter(
            transformer.steps,
            *computed,
            tokens,
            numbers,
            numbers,
            lambda variant: {ENCODED: self._encoder.value(self._last, variant)},
        )
        self._decoder_steps = transformer.steps

    @property
    def asked(self) -> bool:
        """Whether anything has been computed in float64 yet."""
        return self._encoder.asked or self._decoder.asked

    @cached_property
    def coarse(self) -> frozenset[str]:
        """The points that ggml itself computes coarsely; the decoder's also if they read coarse values of the encoder."""
        first = self._encoder.coarse
        return first | coarse_points(self._decoder_steps, (ENCODED,) if self._last in first else ())

    def distances(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.distances`."""
        first, others = _halves(points)
        return self._encoder.distances(first) | self._decoder.distances(others)

    def from_table(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.from_table`."""
        first, others = _halves(points)
        return self._encoder.from_table(first) | self._decoder.from_table(others)

    def own_rounding(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.own_rounding`."""
        first, others = _halves(points)
        return self._encoder.own_rounding(first) | self._decoder.own_rounding(others)

    def one_entry(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.one_entry`."""
        first, others = _halves(points)
        return self._encoder.one_entry(first) | self._decoder.one_entry(others)

    def spread(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.spread`, of each half by itself."""
        first, others = _halves(points)
        return self._encoder.spread(first) | self._decoder.spread(others)

    def record(self, rows: Rows) -> Rows:
        """See `Arbiter.record`."""
        return (self._encoder if rows.point.startswith(ENCODER) else self._decoder).record(rows)


def _halves(points: Mapping[str, Rows]) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """The records of the encoder and those of the decoder."""
    first = {name: rows for name, rows in points.items() if name.startswith(ENCODER)}
    return first, {name: rows for name, rows in points.items() if name not in first}
