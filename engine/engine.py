"""The interface of our engines, the same for the plain one, the one over several devices, and the fast mode."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.errors import InputError

from .backend import Array, Backend
from .capture.tap import Capture
from .graph import Step, WeightSource
from .kv_cache import KvCache
from .weights.gguf_model import GgufModel, Hyperparameters


class Progress(Struct):
    """One sequence in progress: the position of its first token, how many tokens it has taken, how many passes were made.

    `caches` hold its earlier keys and values, one cache a device; there are none if the engine keeps them itself. `encoded` is an
    encoder's output for the prompt, [E, D]: the tokens that are counted are then the decoder's, and `leading` are those that the
    decoder's first pass takes after its start token.
    """

    first: int
    caches: tuple[KvCache, ...] = ()
    length: int = 0
    passes: int = 0
    encoded: Array | None = None
    leading: tuple[int, ...] = ()


class Engine(Protocol):
    """Runs a model token by token or prompt by prompt, and shows a tap what it computes.

    `steps` and `weights` (float32) say what is computed, so that a step can be computed by itself; `encoder` holds the steps of the
    pass that an encoder–decoder begins with.
    """

    model: GgufModel
    backend: Backend
    hp: Hyperparameters
    steps: Sequence[Step]
    encoder: Sequence[Step] | None
    weights: WeightSource

    @property
    def compute(self) -> str:
        """The arithmetic of products, for a dump's header."""

    @property
    def points(self) -> list[str]:
        """Every point that can be captured, in dataflow order."""

    def check(self, tokens: Sequence[int], before: int) -> None:
        """Raise InputError for tokens that this model cannot take after `before` positions."""

    def expect(self, positions: int) -> None:
        """Prepare for a run over so many positions in all: some models rotate by other frequencies in a longer context."""

    def start(self, first_position: int = 0) -> Progress:
        """A new, empty sequence whose first token stands at `first_position`."""

    def forward(self, tokens: Sequence[int], sequence: Progress, tap: Capture | None = None) -> NDArray[np.float32]:
        """One pass over the next tokens of a sequence: [T] -> logits of the last position [V], on the host.

        Raises:
            InputError: no tokens, ids outside the vocabulary, or more than the model's context holds.
        """


def points_of(steps: Sequence[Step]) -> list[str]:
    """The points that steps make, in their order."""
    return [step.makes for step in steps if not step.inner]


def check_tokens(hp: Hyperparameters, tokens: Sequence[int], before: int) -> None:
    """Raise InputError for tokens that a model of these hyperparameters cannot take after `before` positions."""
    if not len(tokens):
        raise InputError("there are no tokens.", "Give a prompt that is not empty.", code="tokens")
    wrong = [token for token in tokens if not 0 <= token < hp.n_vocab]
    if wrong:
        raise InputError(
            f"token id {wrong[0]} is outside the vocabulary of {hp.n_vocab:,} tokens.",
            "`parity tokens` shows how llama.cpp tokenizes a prompt.",
            code="tokens",
        )
    if before + len(tokens) > hp.n_ctx_train:
        raise InputError(
            f"{before + len(tokens):,} positions are more than the model's context of {hp.n_ctx_train:,}.",
            "Use a shorter prompt.",
            code="context",
        )


def whole_input() -> InputError:
    """The error for an encoder's input that comes in portions."""
    return InputError(
        "an encoder computes its whole input in one pass and keeps nothing for another.",
        "Give all tokens at once.",
        code="encoder",
    )
