"""A run's request: plain data that commands fill in and that is passed on as a whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

from msgspec import Struct, field
from msgspec.structs import replace

from checkpoints.mapping import Mapping
from checkpoints.recording import Recording

from .command import Command

Progress = Callable[[str, int, int | None], None]  # (side, done, total); total is None if it is not known


class Request(Recording, frozen=True):
    """The request of `parity run`. If ids are given, `tokens` are used and `prompt` is only their text.

    `command` starts a foreign engine; `mapping` says what its names mean and where its positions begin. `generate` is how many
    tokens llama.cpp has to choose after the prompt; our side then computes the same tokens. `arbiter`: when float64 decides which
    side is right ("off", "auto", "all").
    """

    model: Path
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    backend: str = "auto"
    devices: tuple[int, ...] = ()
    command: Command | None = None
    generate: int = 0
    window: int | Literal["auto", "off"] = "auto"
    threads: int | None = None
    tolerance: float | None = None
    strict: bool = False
    compute: str | None = None
    arbiter: str = "auto"
    despite_lint: bool = False
    mapping: Mapping = field(default_factory=Mapping)
    out: Path | None = None
    verbose: bool = False


class Prompt(Struct, frozen=True):
    """Token ids with their texts, the same for the generated tokens that follow them, and how they are computed.

    Attributes:
        portions: how many of the prompt's tokens each forward pass takes; () for all of them in one.
        ubatch: the most tokens that the engine computes at once within a pass; None for all.
        companions: prompts that are computed together with this one, which is the last sequence of the batch.
        saved: how many tokens are computed before the state is saved and restored by a new process; 0 for no such restart.
        decoded: for an encoder–decoder: tokens that the decoder takes after its start token; `portions` then counts these.
    """

    text: str | None
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    generated: tuple[int, ...] = ()
    generated_pieces: tuple[str, ...] = ()
    portions: tuple[int, ...] = ()
    ubatch: int | None = None
    companions: tuple[tuple[int, ...], ...] = ()
    saved: int = 0
    decoded: tuple[int, ...] = ()

    def followed_by(self, ids: tuple[int, ...], pieces: tuple[str, ...]) -> Self:
        """The same prompt, with generated tokens after it."""
        return replace(self, generated=ids, generated_pieces=pieces)
