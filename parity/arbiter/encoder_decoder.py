"""The truth about an encoder–decoder: the encoder's steps over the prompt, the decoder's over its own tokens, each in float64."""

from collections.abc import Callable, Mapping, Sequence
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
    def started(self) -> bool:
        """Whether anything has been computed in float64 yet."""
        return self._encoder.started or self._decoder.started

    @cached_property
    def coarse(self) -> frozenset[str]:
        """The points that ggml itself computes coarsely; the decoder's also if they read coarse values of the encoder."""
        first = self._encoder.coarse
        return first | coarse_points(self._decoder_steps, (ENCODED,) if self._last in first else ())

    def _of_both(
        self, ask: Callable[[Arbiter, Mapping[str, Rows]], dict[str, Floats]], points: Mapping[str, Rows]
    ) -> dict[str, Floats]:
        """What the arbiter of each half says of its own records."""
        first = {name: rows for name, rows in points.items() if name.startswith(ENCODER)}
        others = {name: rows for name, rows in points.items() if name not in first}
        return ask(self._encoder, first) | ask(self._decoder, others)

    def distances(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.distances`."""
        return self._of_both(Arbiter.distances, points)

    def from_table(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.from_table`."""
        return self._of_both(Arbiter.from_table, points)

    def own_rounding(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.own_rounding`."""
        return self._of_both(Arbiter.own_rounding, points)

    def one_entry(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.one_entry`."""
        return self._of_both(Arbiter.one_entry, points)

    def largest_entry(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.largest_entry`."""
        return self._of_both(Arbiter.largest_entry, points)

    def spread(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.spread`, of each half by itself."""
        return self._of_both(Arbiter.spread, points)

    def table_spread(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `Arbiter.table_spread`, of each half by itself."""
        return self._of_both(Arbiter.table_spread, points)

    def record(self, rows: Rows) -> Rows:
        """See `Arbiter.record`."""
        return (self._encoder if rows.point.startswith(ENCODER) else self._decoder).record(rows)
