"""Our engine: a GGUF model as a list of steps, its weights and its KV cache."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.errors import InputError
from checkpoints.graph import RecordedGraph
from checkpoints.long_factors import LONG, SHORT, factors_of
from checkpoints.points import ENCODER, LOGITS

from . import graph
from .backend import Array, Backend
from .blocks import Blocks
from .capture.tap import Capture, CapturedPass
from .engine import Progress, check_tokens, points_of, whole_input
from .graph import Step
from .kv_cache import KvCache
from .models import steps_of
from .weights.gguf_model import GgufModel
from .weights.source import Weights


class Transformer:
    """Runs a model step by step, on one device or on the host, in float32; an `Engine`.

    The first pass of an encoder–decoder is the encoder's over the prompt, and the decoder's over its start token (and any tokens
    that it is led along).

    `recorded` is llama.cpp's graph of the model, None if its steps are written by hand. `steps` are those of a pass over several
    tokens, `single` those of a pass over one token, which llama.cpp may compute differently.

    Raises:
        ModelError: a graph is needed but not given, our engine lacks an operation, or a weight is missing or misshapen.
    """

    def __init__(
        self, model: GgufModel, backend: Backend, *, resident: bool = True, recorded: RecordedGraph | None = None
    ) -> None:
        self.model = model
        self.backend = backend
        self.hp = model.hyperparameters
        self.steps: Sequence[Step]
        self.single: Sequence[Step] | None = None
        self.encoder: Sequence[Step] | None = None
        self.recorded = recorded
        self.decoder_start = None if recorded is None else recorded.start
        self.longest = None if recorded is None else recorded.longest
        self._long_above = None if recorded is None else recorded.long_above
        if recorded is None:
            self.steps = steps_of(self.hp.architecture, Blocks(self.hp, model.tensors))
        else:
            from .lift import lift  # with all of ggml's operations, which a list written by hand does not need

            lifted = lift(recorded)
            self.steps, self.single, self.encoder = lifted.several, lifted.single, lifted.encoder
        self.weights: graph.WeightSource = Weights(model, backend, resident=resident)

    @property
    def compute(self) -> str:
        """The arithmetic of products, for a dump's header."""
        return "f32"

    @cached_property
    def causal(self) -> bool:
        """Whether no position sees a later one; an encoder's do."""
        return not graph.sees_later(self.steps)

    @cached_property
    def whole(self) -> bool:
        """Whether a prompt must be computed in one pass."""
        return graph.in_one_pass(self.steps)

    @property
    def points(self) -> list[str]:
        """Every point that can be captured, in dataflow order."""
        return points_of((*(self.encoder or ()), *self.steps))

    def expect(self, positions: int) -> None:
        """Prepare for a run over this many positions in all: some models rotate by other frequencies in a longer context."""
        if self._long_above is None:
            return
        wanted = factors_of(positions, self._long_above)
        if any(wanted in step.weights for step in self.steps):
            return
        self.steps = [_with_factors(step, wanted) for step in self.steps]
        self.single = None if self.single is None else [_with_factors(step, wanted) for step in self.single]

    def start(self, first_position: int = 0) -> Progress:
        """A new, empty sequence whose first token stands at `first_position`; a decoder's after an encoder always at 0."""
        return Progress(0 if self.encoder is not None else first_position, (KvCache(self.backend.xp),))

    @property
    def cache_backends(self) -> tuple[Backend, ...]:
        """Where the caches of a sequence lie, in their order."""
        return (self.backend,)

    def forward(self, tokens: Sequence[int], sequence: Progress, tap: Capture | None = None) -> NDArray[np.float32]:
        """One pass over the next tokens of a sequence: [T] -> logits of the last position [V], on the host.

        Raises:
            InputError: no tokens, ids outside the vocabulary, or more than the model's context holds.
        """
        self.check(tokens, sequence.first + sequence.length)
        if self.encoder is not None and sequence.encoded is None:
            self._encode(tokens, sequence, tap)
            tokens = (self.decoder_start or 0, *sequence.leading)
        if sequence.length and self.whole:
            raise whole_input()
        positions = np.arange(len(tokens), dtype=np.int64) + sequence.first + sequence.length
        if tap is not None:
            tap.begin(
                CapturedPass(positions, sequence.passes, decode=sequence.passes > 0, first=sequence.first, causal=self.causal)
            )
        values: dict[str, Array] = {} if sequence.encoded is None else {graph.ENCODED: sequence.encoded}
        values |= {
            graph.TOKENS: self.backend.array(np.asarray(tokens, dtype=np.int64)),
            graph.POSITIONS: self.backend.array(positions),
            graph.PASSES: self.backend.array(np.full(len(tokens), sequence.passes)),
        }
        logits = self._compute(values, sequence, tap or _nothing)
        sequence.length += len(tokens)
        sequence.passes += 1
        return self.backend.to_host(logits[-1])

    def _encode(self, tokens: Sequence[int], sequence: Progress, tap: Capture | None) -> None:
        """Run the encoder over a prompt and keep its output with the sequence, whose positions are the decoder's."""
        assert self.encoder is not None
        positions = np.arange(len(tokens), dtype=np.int64)
        if tap is not None:
            tap.begin(CapturedPass(positions, sequence.passes, decode=False, causal=not graph.sees_later(self.encoder)))
        values = {
            ENCODER + graph.TOKENS: self.backend.array(np.asarray(tokens, dtype=np.int64)),
            ENCODER + graph.POSITIONS: self.backend.array(positions),
        }
        last = self.encoder[-1].makes
        encoded = graph.run(self.encoder, values, self.weights, sequence.caches[0], tap or _nothing, keep=(last,))
        sequence.encoded = encoded[last]

    def _compute(self, values: dict[str, Array], sequence: Progress, tap: graph.Tap) -> Array:
        """Run all steps and return the last one's value."""
        steps = self.single if self.single is not None and len(values[graph.TOKENS]) == 1 else self.steps
        last = LOGITS if any(step.makes == LOGITS for step in steps) else steps[-1].makes
        return graph.run(steps, values, self.weights, sequence.caches[0], tap, keep=(last,))[last]

    def check(self, tokens: Sequence[int], before: int) -> None:
        """Raise InputError for tokens that this model cannot take after `before` positions."""
        check_tokens(self.hp, tokens, before)
        if self.longest is not None and before + len(tokens) > self.longest:
            raise InputError(
                f"attention's windows over {before + len(tokens):,} positions were not observed when the graph of "
                f"{self.hp.architecture} was recorded: only {self.longest:,} positions were.",
                "Use a shorter prompt; `parity dump ref` and `parity diff` have no such limit.",
                code="context",
            )


def _with_factors(step: Step, wanted: str) -> Step:
    """The step with the wanted frequency factors instead of its own."""
    if not {SHORT, LONG} & {weight for weight in step.weights if isinstance(weight, str)}:
        return step
    return replace(step, weights=tuple(wanted if weight in (SHORT, LONG) else weight for weight in step.weights))


def _nothing(_name: str, _value: Array) -> None:
    """The tap of a run that captures nothing."""
