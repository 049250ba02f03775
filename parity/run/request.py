"""What one experiment is asked to be: plain data that commands fill in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from checkpoints.mapping import Mapping
from checkpoints.record import DEFAULT_SLICE
from engine.capture.host import Positions

Progress = Callable[[str, int, int | None], None]  # (side, done, total); no total: how long it takes is not known


@dataclass(frozen=True)
class Request:
    """What `parity run` was asked for. Where ids are given, `tokens` are taken and `prompt` is only the text they stand for.

    `command` is a foreign engine's command line, `mapping` what its names mean and where its positions begin.
    """

    model: Path
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    mode: Literal["exact", "native"] = "exact"
    backend: str = "auto"
    devices: tuple[int, ...] = ()
    command: str | None = None
    points: str = "default"
    layers: tuple[int, ...] | None = None
    positions: Positions = "all"
    slice_size: int = DEFAULT_SLICE
    full: bool = False
    generate: int = 0
    window: int | Literal["auto", "off"] = "auto"
    threads: int | None = None
    first_position: int = 0
    tolerance: float | None = None
    strict: bool = False
    compute: str | None = None
    despite_lint: bool = False
    mapping: Mapping = field(default_factory=Mapping)
    out: Path | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Prompt:
    """Token ids and their texts."""

    text: str | None
    ids: tuple[int, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Generated:
    """The tokens that llama.cpp chose, which our side is led along."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
