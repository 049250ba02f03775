"""Predictions over a text: how good they are, and how far from those of a base."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from math import inf
from pathlib import Path
from time import perf_counter

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.score import Scored, Worst
from checkpoints.errors import InputError
from checkpoints.points import ENCODER, LOGITS
from reference.client import Reference

from ..drift.golden import Golden, GoldenPrompt
from ..drift.golden import load as load_golden
from ..run.request import Request
from ..run.sides import EXEC, REF
from .base import Base, BaseWriter, load
from .golden import GoldenPredictions, chunks_of
from .measures import LEAST, TOP, Listed, Row, Tally, kl_of_list, kl_of_lists, kl_of_shared, kl_whole, largest, log_sum
from .predictions import Ambiguous, ExternalPredictions, LlamaCppPredictions, OurPredictions, Predicted, Predictor, Reader
from .text import Chunk, chunks, read_text

Progress = Callable[[int, int, float], None]  # chunks done, of how many, perplexity so far
_LEADING = 60  # characters of text before the worst position


class ScoreRequest(Struct, frozen=True):
    """What `parity score` was asked for: `run` says how the side computes.

    `base` is a base file, `golden` a folder of golden dumps, whose prompts are then the text; without them the base is llama.cpp in
    exact mode on `base_model`, else on the side's own model. `alone`: no base. `opened` makes the side, if it is none of `run`'s, of
    a llama.cpp and the number of tokens in the vocabulary.
    """

    run: Request
    text: Path | None
    source: str
    context: int = 512
    chunks: int | None = None
    base: Path | None = None
    base_model: Path | None = None
    save_base: Path | None = None
    alone: bool = False
    golden: Path | None = None
    opened: Callable[[Reference, int], Predictor] | None = None


def score(request: ScoreRequest, progress: Progress = lambda *_: None) -> tuple[Scored, tuple[int, ...]]:
    """The figures, and the ids that lead to the worst position (empty without a base).

    Raises:
        ParityError: whatever is wrong with the request, the text, the model or a side, in one line.
    """
    began = perf_counter()
    run = request.run
    with ExitStack() as stack:
        reference = stack.enter_context(Reference(verbose=run.verbose, threads=run.threads))
        text = _text(request, reference)
        _require_predictions(reference, run.model)
        vocabulary = reference.tokenize(run.model, "a").n_vocab
        side = request.opened(reference, vocabulary) if request.opened is not None else _side(request, reference, vocabulary)
        base = _base(request, text, vocabulary, stack)
        writer = BaseWriter(side.name, request.context) if request.save_base is not None else None
        figures = _Figures(base, writer)
        for part in text.chunks:
            figures.chunk(part, side)
            if figures.tally.count:
                progress(part.number + 1, len(text.chunks), figures.tally.perplexity[0])
        figures.require()
        worst = figures.worst(reference, run.model)
        if writer is not None and request.save_base is not None:
            writer.save(request.save_base)
        cause = side.cause() if isinstance(side, Reader) else None  # last: whatever becomes of it, the base is written
    tally = figures.tally
    perplexity, error = tally.perplexity
    return (
        Scored(
            side=side.name,
            base="" if base is None else base.name,
            text=text.name,
            model=run.model.name,
            tokens=text.tokens,
            context=0 if text.prompts else request.context,
            chunks=len(text.chunks),
            positions=tally.count,
            perplexity=perplexity,
            perplexity_error=error,
            bounded=tally.bounded,
            exact=figures.exact,
            worst=worst,
            causes=(cause,) if cause is not None else (),
            seconds=perf_counter() - began,
            notes=(*figures.notes, *(side.notes if isinstance(side, Reader) else ())),
            **tally.compared(),  # type: ignore[arg-type]
        ),
        figures.leading,
    )


class _Text(Struct, frozen=True):
    """The text to score, in chunks; or golden prompts, each as one chunk."""

    name: str
    tokens: int
    chunks: tuple[Chunk, ...]
    prompts: tuple[GoldenPrompt, ...] = ()
    golden: Golden | None = None


def _text(request: ScoreRequest, reference: Reference) -> _Text:
    if request.golden is not None:
        golden = load_golden(request.golden)
        golden.model_path(request.run.model)
        parts, prompts = chunks_of(golden, request.chunks)
        return _Text(f"prompts of {golden.folder.name}", sum(len(part.tokens) for part in parts), tuple(parts), prompts, golden)
    assert request.text is not None  # one of both is given
    text = read_text(request.text)
    parts, total = chunks(reference, request.run.model, text, request.context, request.chunks)
    return _Text(request.text.name, total, tuple(parts))


def _base(request: ScoreRequest, text: _Text, vocabulary: int, stack: ExitStack) -> Base | Predictor | None:
    run = request.run
    if text.golden is not None:
        return GoldenPredictions(text.golden, text.prompts, vocabulary)
    if request.base is not None:
        base = load(request.base)
        base.check(text.chunks, vocabulary, request.base)
        return base
    if request.alone:
        return None
    other = stack.enter_context(Reference(verbose=run.verbose, threads=run.threads))
    model = request.base_model or run.model
    if model != run.model:
        _require_predictions(other, model)
        _same_vocabulary(other, model, vocabulary)
    return LlamaCppPredictions(other, model, "exact", f"llama.cpp, {model.name} as F32")


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
            "Use a decoder; `parity run` compares this model's checkpoints.",
            code="encoder",
        )


def _same_vocabulary(reference: Reference, model: Path, vocabulary: int) -> None:
    count = reference.tokenize(model, "a").n_vocab
    if count != vocabulary:
        raise InputError(
            f"{model.name} has {count:,} tokens and the side's model {vocabulary:,}: their predictions cannot be compared.",
            "Use a --base-model with the same vocabulary.",
            code="base",
        )


class _Figures:
    """What is known after each chunk: sums, and the worst position."""

    def __init__(self, base: "Base | Predictor | None", writer: BaseWriter | None) -> None:
        self.tally = Tally()
        self.leading: tuple[int, ...] = ()
        self.broken, self.broken_at = 0, ""
        self.exact = not isinstance(base, Base)
        self._base, self._writer = base, writer
        self._rows = 0  # of a base file, before the chunk
        self._otherwise = 0  # chunks that the side reads as other tokens
        self._worst: Worst | None = None

    def chunk(self, chunk: Chunk, side: Predictor) -> None:
        """Score one chunk; left out if the side reads it as other tokens than those of recorded predictions."""
        recorded = chunk
        if isinstance(side, Reader):
            chunk = side.read(chunk)
        if chunk.tokens != recorded.tokens:
            self._otherwise += 1
        if chunk.tokens == recorded.tokens or not self._is_recorded:
            self._scored(chunk, side)
        self._rows += len(recorded.scored)

    @property
    def _is_recorded(self) -> bool:
        """Whether the base has predictions of the text's own chunks only, and cannot compute others."""
        return isinstance(self._base, Base | GoldenPredictions)

    def _scored(self, chunk: Chunk, side: Predictor) -> None:
        if self._writer is not None:
            self._writer.chunk(chunk)
        with ExitStack() as stack:
            others: Predicted | None = None
            if isinstance(self._base, Base):
                others = stack.enter_context(closing(self._base.rows(chunk, self._rows)))
            elif self._base is not None:
                others = stack.enter_context(closing(self._base.rows(chunk)))
            self._positions(chunk, stack.enter_context(closing(side.rows(chunk))), others)

    def _positions(self, chunk: Chunk, rows: Predicted, others: Predicted | None) -> None:
        for position, predicted in rows:
            following = chunk.tokens[position + 1]
            other = None
            if others is not None:
                other = next((_known(there, None) for at, there in others if at == position), None)
                if other is None:
                    raise RuntimeError(f"the base has no prediction at position {position}")
            row = _known(predicted, other)
            broken = next((name for name, values in (("the side", row), ("the base", other)) if _broken(values)), "")
            if broken:
                self._unusable(chunk, position, broken)
                if self._writer is not None and not isinstance(row, Listed):
                    self._writer.add(row, following)
                continue
            log_p = _log_p(row, following)
            most = row.most_of_others if isinstance(row, Listed) and log_p is None else 0.0
            self.tally.predicted(most if log_p is None else log_p, bounded=log_p is None)
            if self._writer is not None and not isinstance(row, Listed):
                self._writer.add(row, following)
            if other is not None:
                self._compared(chunk, position, row, other, log_p)

    def _compared(self, chunk: Chunk, position: int, row: "Row | Listed", other: "Row | Listed", log_p: float | None) -> None:
        following = chunk.tokens[position + 1]
        kl, unseen = _kl(other, row)
        self.exact = self.exact and not isinstance(row, Listed)
        listed = isinstance(row, Listed) or isinstance(other, Listed)
        our_top, their_top = _top(row, normalised=listed), _top(other, normalised=listed)
        base_log_p = _log_p(other, following)
        assert base_log_p is not None  # a base knows the text's own token
        self.tally.against(kl, unseen, base_log_p, [number for number, _ in our_top], [number for number, _ in their_top])
        if log_p is not None:
            self.tally.moved(log_p, base_log_p)
        if self._worst is None or kl > self._worst.kl:
            self._worst = Worst(chunk.number, position, kl, "", following, "", our_top, their_top)
            self.leading = chunk.tokens[: position + 1]

    def _unusable(self, chunk: Chunk, position: int, whose: str) -> None:
        """A position at which logits are not numbers: the first one is the worst of all."""
        self.broken += 1
        if self.broken == 1:
            self.broken_at = f"the first is position {position} of chunk {chunk.number}, of {whose}"
            self._worst = Worst(chunk.number, position, inf, "", chunk.tokens[position + 1], "", (), ())
            self.leading = chunk.tokens[: position + 1]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, in sentences."""
        notes = []
        if self._otherwise:
            how = "left out, since the base has no others" if self._is_recorded else "which were scored"
            notes.append(f"chunks whose text has other tokens alone, {how}: {self._otherwise}")
        if self.broken:
            notes.append(f"positions left out, because logits there are not numbers: {self.broken} ({self.broken_at})")
        return tuple(notes)

    def require(self) -> None:
        """Raises InputError if nothing was scored."""
        if not self.tally.count:
            problem = f" Logits are not numbers at {self.broken} positions: {self.broken_at}." if self.broken else ""
            if self._otherwise and self._is_recorded:
                problem += f" Chunks whose text has other tokens alone than the base: {self._otherwise}."
            raise InputError(f"nothing was predicted that could be scored.{problem}", "Use a longer text.", code="text")

    def worst(self, reference: Reference, model: Path) -> Worst | None:
        """The worst position with its texts."""
        if self._worst is None:
            return None
        before = "".join(reference.pieces(model, self.leading))[-_LEADING:]
        return replace(self._worst, before=before, text=reference.pieces(model, [self._worst.token])[0])


def _known(predicted: "Row | Listed | Ambiguous", base: "Row | Listed | None") -> "Row | Listed":
    return predicted.beside(base) if isinstance(predicted, Ambiguous) else predicted


def _broken(row: "Row | Listed | None") -> bool:
    """Whether a row has NaN, infinity, or nothing but −∞."""
    if row is None:
        return False
    return bool(np.isnan(row.logprobs).any()) if isinstance(row, Listed) else not np.isfinite(log_sum(row))


def _log_p(row: "Row | Listed", token: int) -> float | None:
    return row.logprob(token) if isinstance(row, Listed) else float(row[token]) - log_sum(row)


def _top(row: "Row | Listed", *, normalised: bool) -> tuple[tuple[int, float], ...]:
    """The first choices with their logits, or, from a server's list, with their log-probabilities."""
    if isinstance(row, Listed):
        return tuple(zip(row.ids[:TOP].tolist(), row.logprobs[:TOP].tolist(), strict=True))
    total = log_sum(row) if normalised else 0.0
    return tuple((int(number), float(row[number]) - total) for number in largest(row, TOP))


def _kl(base: "Row | Listed", ours: "Row | Listed") -> tuple[float, float]:
    """KL(base ‖ ours), and the probability of the tokens that count as one: 0 where both sides are whole."""
    if isinstance(base, Listed):
        return kl_of_lists(base, ours) if isinstance(ours, Listed) else kl_of_list(base, ours)
    if isinstance(ours, Listed):
        p = base[ours.ids].astype(np.float64) - log_sum(base)
        return kl_of_shared(p, ours.logprobs, LEAST)
    return kl_whole(base, ours), 0.0
