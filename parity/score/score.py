"""Predictions over a text: how good they are, and how far from those of a base."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from checkpoints.answers.score import Scored, Worst
from checkpoints.errors import InputError
from checkpoints.points import ENCODER, LOGITS
from reference.client import Reference

from ..run.request import Request
from ..run.sides import EXEC, REF
from .base import Base, BaseWriter, load
from .measures import TOP, Row, Tally, kl_of_top, kl_whole, largest, log_sum
from .predictions import ExternalPredictions, LlamaCppPredictions, OurPredictions, Predictor, Rows
from .text import Chunk, chunks, read_text

Progress = Callable[[int, int, float], None]  # chunks done, of how many, perplexity so far
_LEADING = 60  # characters of text before the worst position


@dataclass(frozen=True)
class ScoreRequest:
    """What `parity score` was asked for: `run` says how the side computes.

    `base` is a base file; without one the base is llama.cpp in exact mode on `base_model`, else on the side's own model. `alone`: no base.
    """

    run: Request
    text: Path
    source: str
    context: int = 512
    chunks: int | None = None
    base: Path | None = None
    base_model: Path | None = None
    save_base: Path | None = None
    alone: bool = False


@dataclass(frozen=True)
class _Judged:
    """One position beside the base."""

    kl: float
    base_log_p: float
    base_top: tuple[tuple[int, float], ...]
    unseen: float


def score(request: ScoreRequest, progress: Progress = lambda *_: None) -> tuple[Scored, tuple[int, ...]]:
    """The figures, and the ids that lead to the worst position (empty without a base).

    Raises:
        ParityError: whatever is wrong with the request, the text, the model or a side, in one line.
    """
    began = perf_counter()
    run = request.run
    text = read_text(request.text)
    with ExitStack() as stack:
        reference = stack.enter_context(Reference(verbose=run.verbose, threads=run.threads))
        parts, total = chunks(reference, run.model, text, request.context, request.chunks)
        _require_predictions(reference, run.model)
        vocabulary = reference.tokenize(run.model, "a").n_vocab
        side = _side(request, reference, vocabulary)
        base: Base | Predictor | None = None
        if request.base is not None:
            base = load(request.base)
            base.check(parts, request.base)
        elif not request.alone:
            other = stack.enter_context(Reference(verbose=run.verbose, threads=run.threads))
            model = request.base_model or run.model
            if model != run.model:
                _require_predictions(other, model)
                _same_vocabulary(other, model, vocabulary)
            base = LlamaCppPredictions(other, model, "exact", f"llama.cpp, {model.name} as F32")
        writer = BaseWriter(side.name, request.context) if request.save_base is not None else None
        figures = _Figures(base, writer)
        for part in parts:
            figures.chunk(part, side)
            progress(part.number + 1, len(parts), figures.tally.perplexity[0])
        worst = figures.worst(reference, run.model)
        if writer is not None and request.save_base is not None:
            writer.save(request.save_base)
    perplexity, error = figures.tally.perplexity
    return (
        Scored(
            side=side.name,
            base="" if base is None else base.name,
            text=request.text.name,
            model=run.model.name,
            tokens=total,
            context=request.context,
            chunks=len(parts),
            positions=figures.tally.count,
            perplexity=perplexity,
            perplexity_error=error,
            exact=not isinstance(base, Base),
            unseen=figures.unseen,
            worst=worst,
            seconds=perf_counter() - began,
            **figures.tally.compared(),  # type: ignore[arg-type]
        ),
        figures.leading,
    )


def _side(request: ScoreRequest, reference: Reference, vocabulary: int) -> Predictor:
    run = request.run
    if request.source == EXEC and run.command is not None:
        return ExternalPredictions(run, run.command, reference, vocabulary)
    if request.source == REF:
        how = "as F32" if run.mode == "exact" else "its own types"
        return LlamaCppPredictions(reference, run.model, run.mode, f"llama.cpp, {run.model.name}, {how}")
    return OurPredictions(run, reference)


def _require_predictions(reference: Reference, model: Path) -> None:
    """Raises InputError for an encoder, which has no logits, and for an encoder–decoder, whose logits are of other tokens."""
    points = [name for name, _ in reference.describe(model).points]
    if LOGITS not in points or any(name.startswith(ENCODER) for name in points):
        raise InputError(
            f"{model.name} does not predict each token of a text from those before it: it is an encoder, or has one.",
            "Take a decoder; `parity run` compares this model's checkpoints.",
            code="encoder",
        )


def _same_vocabulary(reference: Reference, model: Path, vocabulary: int) -> None:
    count = reference.tokenize(model, "a").n_vocab
    if count != vocabulary:
        raise InputError(
            f"{model.name} has {count:,} tokens and the side's model {vocabulary:,}: their predictions cannot be compared.",
            "Take a --base-model with the same vocabulary.",
            code="base",
        )


class _Figures:
    """What is known after each chunk: sums, and the worst position."""

    def __init__(self, base: "Base | Predictor | None", writer: BaseWriter | None) -> None:
        self.tally = Tally()
        self.unseen = 0.0
        self.leading: tuple[int, ...] = ()
        self._base, self._writer = base, writer
        self._row = 0  # of a base file
        self._worst: Worst | None = None

    def chunk(self, chunk: Chunk, side: Predictor) -> None:
        """Score one chunk."""
        if self._writer is not None:
            self._writer.chunk(chunk)
        with ExitStack() as stack:
            others = None
            if self._base is not None and not isinstance(self._base, Base):
                others = stack.enter_context(closing(self._base.rows(chunk)))
            self._positions(chunk, stack.enter_context(closing(side.rows(chunk))), others)

    def _positions(self, chunk: Chunk, rows: Rows, others: Rows | None) -> None:
        for position, row in rows:
            following = chunk.tokens[position + 1]
            log_p = float(row[following]) - log_sum(row)
            self.tally.predicted(log_p)
            if self._writer is not None:
                self._writer.add(row, following)
            judged = self._judged(position, row, following, others)
            if judged is not None:
                self._compared(chunk, position, row, log_p, judged)

    def _judged(self, position: int, row: Row, following: int, others: Rows | None) -> _Judged | None:
        if isinstance(self._base, Base):
            base, at = self._base, self._row
            self._row += 1
            ids = base.ids[at].astype(np.int64)
            kl, unseen = kl_of_top(ids, base.logits[at], float(base.log_sums[at]), row)
            top = tuple((int(i), float(x)) for i, x in zip(ids[:TOP], base.logits[at][:TOP], strict=True))
            return _Judged(kl, float(base.next_logits[at]) - float(base.log_sums[at]), top, unseen)
        if others is None:
            return None
        there, other = next(others)
        if there != position:
            raise RuntimeError(f"the base is at position {there}, the side at {position}")
        ids = largest(other, TOP)
        top = tuple((int(i), float(other[i])) for i in ids)
        return _Judged(kl_whole(other, row), float(other[following]) - log_sum(other), top, 0.0)

    def _compared(self, chunk: Chunk, position: int, row: Row, log_p: float, judged: _Judged) -> None:
        mine = largest(row, TOP)
        base_ids = np.array([number for number, _ in judged.base_top], dtype=np.int64)
        self.tally.against(judged.kl, log_p, judged.base_log_p, mine, base_ids)
        self.unseen = max(self.unseen, judged.unseen)
        if self._worst is None or judged.kl > self._worst.kl:
            ours = tuple((int(i), float(row[i])) for i in mine)
            self._worst = Worst(chunk.number, position, judged.kl, "", chunk.tokens[position + 1], "", ours, judged.base_top)
            self.leading = chunk.tokens[: position + 1]

    def worst(self, reference: Reference, model: Path) -> Worst | None:
        """The worst position with its texts."""
        if self._worst is None:
            return None
        before = "".join(reference.pieces(model, self.leading))[-_LEADING:]
        return replace(self._worst, before=before, text=reference.pieces(model, [self._worst.token])[0])
