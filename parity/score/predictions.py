"""The predictions of a side over a chunk, one row of logits at a time: no more than a few rows are in memory."""

from collections.abc import Generator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, runtime_checkable

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.server import ServerCause
from checkpoints.errors import DumpError
from checkpoints.mapping import Mapping
from checkpoints.points import LOGITS
from checkpoints.reading.parallel import Sharing
from checkpoints.reading.scan import Scan
from checkpoints.record import Rows as Records
from checkpoints.record import Token
from engine.capture.host import HostStage
from engine.capture.tap import Capture
from engine.opened import open_engine
from engine.weights.gguf_model import GgufModel
from reference.client import Reference

from ..run.command import Command
from ..run.request import Prompt, Request
from ..run.sides import ExternalEngine
from .measures import Listed
from .text import Chunk

Row = NDArray[np.float32]  # logits [V]
Rows = Generator[tuple[int, Row], None, None]  # (position, its row)
PORTION = 16  # positions computed at once: 16 rows of 151,936 logits are 10 MB


@runtime_checkable
class Ambiguous(Protocol):
    """Candidates that are given as texts, which several tokens may share."""

    def beside(self, base: Row | Listed | None) -> Listed:
        """As tokens, where the base's prediction decides which."""


Predicted = Generator[tuple[int, Row | Listed | Ambiguous], None, None]  # (position, all logits or what is known of them)


class Predictor(Protocol):
    """A side that predicts."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def rows(self, chunk: Chunk) -> Predicted:
        """(position, logits [V] or what is known of them) of the scored positions, in order."""


@runtime_checkable
class Reader(Protocol):
    """A predictor that reads a chunk by itself: its text, say, which alone may have other tokens than within a longer text."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, in sentences."""

    def read(self, chunk: Chunk) -> Chunk:
        """The chunk as it was read. Called before `rows`."""

    def cause(self) -> ServerCause | None:
        """What explains its predictions, if they are not llama.cpp's and something does."""


class LlamaCppPredictions(Struct, frozen=True):
    """llama.cpp, exact (the F32 twin) or native."""

    reference: Reference
    model: Path
    mode: str
    name: str

    def rows(self, chunk: Chunk) -> Rows:
        """(position, logits [V]) of the scored positions, in order."""
        position = chunk.first
        predictions = self.reference.logits(self.model, chunk.tokens[:-1], first=chunk.first, portion=PORTION, mode=self.mode)
        for part in predictions:
            for row in part:
                yield position, row
                position += 1


class _Collected:
    """A sink that keeps the rows of the pass in progress."""

    def __init__(self) -> None:
        self.parts: list[Records] = []

    def rows(self, rows: Records) -> None:
        """Keep the rows."""
        self.parts.append(rows)

    def token(self, token: Token) -> None:
        """Nothing is generated here."""


class OurPredictions:
    """The engine that comes with parity."""

    name = "our engine"

    def __init__(self, request: Request, reference: Reference) -> None:
        self._engine = open_engine(
            GgufModel(request.model),
            request.backend,
            request.devices,
            native=request.mode == "native",
            recorded=lambda: reference.graph(request.model),
        )

    def rows(self, chunk: Chunk) -> Rows:
        """(position, logits [V]) of the scored positions, in order."""
        self._engine.expect(len(chunk.tokens))
        sequence = self._engine.start()
        tokens = chunk.tokens[:-1]
        for start in range(0, len(tokens), PORTION):
            sink = _Collected()
            with Capture(HostStage(sink, [LOGITS], self._engine.backend, slice_size=None)) as tap:
                self._engine.forward(tokens[start : start + PORTION], sequence, tap)
            for part in sink.parts:
                for position, values in zip(part.token_idx.tolist(), part.values, strict=True):
                    if position >= chunk.first:
                        yield position, values


class ExternalPredictions:
    """A foreign engine: a dump a chunk, whose `logits` have all values of a row; read as a stream and deleted."""

    def __init__(self, request: Request, command: Command, reference: Reference, vocabulary: int) -> None:
        self._request = replace(request, points=LOGITS)
        self._side = ExternalEngine(self._request, command, reference)
        self._vocabulary = vocabulary

    @property
    def name(self) -> str:
        """Its program's name."""
        return self._side.name

    def rows(self, chunk: Chunk) -> Rows:
        """(position, logits [V]) of the scored positions, in order.

        Raises:
            DumpError: a scored position has no row of logits, or not all of its values.
        """
        with TemporaryDirectory(prefix="parity-score-") as folder:
            out = Path(folder) / "logits.jsonl"
            self._side.dump(Prompt(None, chunk.tokens[:-1], ()), out)
            advice = "A score needs all of them: print whole rows of `logits` (PARITY_SLICE, slice_size)."
            yield from whole_rows(out, chunk, self._vocabulary, f"{self.name} printed", advice, self._request.mapping)


def whole_rows(
    path: Path, chunk: Chunk, vocabulary: int, whose: str, advice: str, mapping: Mapping | None = None
) -> Generator[tuple[int, Row], None, None]:
    """(position, logits [V]) of a chunk's scored positions, from a dump that is read as a stream.

    Raises:
        DumpError: a scored position has no row of logits, or not all of its values; `whose` begins the sentence, `advice` says what to do.
    """
    wanted = iter(chunk.scored)
    due = next(wanted, None)
    for position, row in _logits(path, mapping or Mapping()):
        if position < chunk.first or due is None:
            continue
        if position != due:
            break
        if len(row) < vocabulary:
            raise DumpError(f"{whose} {len(row):,} of {vocabulary:,} logits at position {position}.", advice, code="logits")
        yield position, row[:vocabulary]
        due = next(wanted, None)
    if due is not None:
        raise DumpError(
            f"{whose} no logits for position {due}.", "A score needs them at every position, in order.", code="logits"
        )


def _logits(path: Path, mapping: Mapping) -> Rows:
    for item in Scan(path, Sharing(processes=0)):
        if isinstance(item, Records) and (item.point == LOGITS or mapping.entry(item.point)[0] == LOGITS):
            offset = mapping.position_offset or 0
            for position, values in zip(item.token_idx.tolist(), item.values, strict=True):
                yield position + offset, values
