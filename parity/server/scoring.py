"""A server's log-probabilities over the chunks of a text, for `parity score`."""

from collections.abc import Generator, Sequence
from math import inf
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.server import ServerCause
from reference.client import Reference

from ..run.request import Prompt
from ..score.measures import Listed
from ..score.text import Chunk
from .ask import PlacedPrediction, Progress, ServerReply, ask_server
from .base import NOTHING, Row
from .diagnosis import diagnose
from .dialects import Dialect, dialect_of
from .http import ServerError
from .predictions import TokenCandidate, require_logarithms
from .session import ServerRequest
from .vocabulary import BROKEN, Vocabulary

_REFUSED = (400, 404, 415, 422, 500)  # how servers say that a prompt must be a text


class Candidates(Struct, frozen=True):
    """A server's candidates of one position; several tokens may have a candidate's text."""

    placed: PlacedPrediction
    own: int
    vocabulary: Vocabulary

    def beside(self, base: Row | Listed | None) -> Listed:
        """As tokens: of several with one text the text's own next one, else the most probable in the base, else the first."""

        def likely(number: int) -> float:
            if number == self.own:
                return inf
            if isinstance(base, Listed):
                known = base.logprob(number)
                return -inf if known is None else known
            return -float(number) if base is None else float(base[number])

        known: dict[int, float] = {}
        for candidate in self.placed.candidates:
            number = self.vocabulary.most_probable(candidate, likely)
            if number is not None and number not in known:
                known[number] = max(candidate.logprob, NOTHING)
        if self.placed.own is not None and self.own not in known and known:
            known[self.own] = max(self.placed.own.logprob, NOTHING)
        return Listed(np.array(list(known), dtype=np.int64), np.array(list(known.values())))


class ServerPredictions:
    """What a server predicts after each token of a chunk: its most probable tokens.

    A server gets the chunk's text, and where it does not echo its ids, if it takes them: then one request a position. Of a text that has
    other tokens alone than within the whole text, these are asked about.
    """

    def __init__(
        self, wanted: ServerRequest, model: Path, reference: Reference, vocabulary: int, progress: Progress | None = None
    ) -> None:
        self._wanted = wanted
        self._progress = progress
        self._model = model
        self._reference = reference
        self._vocabulary = Vocabulary(reference.pieces(model, range(vocabulary)))
        self._dialect: Dialect | None = None
        self._takes_ids = True
        self._placed: Sequence[PlacedPrediction] = ()  # of the chunk that was read last
        self._first: tuple[Prompt, ServerReply] | None = None  # the first chunk
        self._most = 0  # candidates at any position so far
        self._left_out = 0
        self._notes: dict[str, None] = {}

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"server {self._wanted.connection.name}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, in sentences."""
        notes = list(self._notes)
        if self._left_out:
            notes.append(f"positions left out, because the server says nothing about them: {self._left_out}")
        return tuple(notes)

    def read(self, chunk: Chunk) -> Chunk:
        """Ask about a chunk; it comes back with the tokens that were asked about.

        Raises:
            ServerError: the server cannot be reached, gives no log-probabilities or fewer than asked for, or has another tokenizer.
        """
        prompt, reply = self._reply_to(chunk)
        if reply.around is not None:
            raise ServerError(
                "the server does not complete the text as given: its echo has other text around it.",
                "Turn off its chat template for completions; `parity run --server` shows what it adds.",
            )
        if reply.tokenizer is not None:
            position, our_text, server_text = reply.tokenizer
            raise ServerError(
                f"the server's tokens are not {self._model.name}'s: at position {position} of chunk {chunk.number} it has "
                f"{server_text[:40]!r}, llama.cpp {our_text[:40]!r}.",
                "Is it the model that the server runs? If the text names special tokens, choose one without them.",
            )
        if chunk.number == 0:
            self._first = prompt, reply
        try:
            require_logarithms((candidate for item in reply.placed for candidate in item.candidates), self.name)
        except ServerError as error:
            self._first = prompt, reply
            if cause := self.cause():
                raise ServerError(f"{self.name} cannot be scored: {cause.sentence}.", cause.advice) from error
            raise
        last = len(prompt.ids) - 1
        placed = [item for item in reply.placed if chunk.first <= item.position < last and item.candidates]
        self._most = max(self._most, *(len(item.candidates) for item in placed)) if placed else self._most
        wanted = min(self._wanted.top, len(self._vocabulary.pieces))
        if placed and self._most < wanted:
            raise ServerError(
                f"the server gives {self._most} candidates per position, not the {wanted} asked for.",
                f"Use --server-top {self._most}.",
            )
        self._placed = [item for item in placed if any(self._vocabulary.ids(candidate) for candidate in item.candidates)]
        candidates = [candidate for item in placed for candidate in item.candidates]
        if placed and (not self._placed or sum(map(self._named_alike, candidates)) < len(candidates) / 2):
            raise ServerError(
                "the server's candidates are not tokens of this model.", "Is it the model that the server runs? Check --model."
            )
        self._notes |= dict.fromkeys(note for note in reply.notes if not note.startswith("positions left out"))
        self._left_out += last - chunk.first - len(self._placed)
        return replace(chunk, tokens=prompt.ids)

    def cause(self) -> ServerCause | None:
        """What explains the predictions of the text's beginning, if they are not llama.cpp's: some passes over it."""
        if self._first is None:
            return None
        prompt, reply = self._first
        return diagnose(self._reference, self._model, prompt, reply, self._vocabulary)

    def _named_alike(self, candidate: TokenCandidate) -> bool:
        """Whether a candidate's text is that of the token that it stands for."""
        pieces = [self._vocabulary.pieces[number] for number in self._vocabulary.ids(candidate)]
        return any(BROKEN in piece or piece.strip() == candidate.text.strip() for piece in pieces) or not candidate.text.strip()

    def rows(self, chunk: Chunk) -> Generator[tuple[int, Candidates], None, None]:
        """(position, its candidates) of the scored positions that the server answered, in order."""
        for item in self._placed:
            yield item.position, Candidates(item, chunk.tokens[item.position + 1], self._vocabulary)

    def _reply_to(self, chunk: Chunk) -> tuple[Prompt, ServerReply]:
        """What the server says of a chunk, and the prompt that it was given."""
        if self._dialect is None:
            wanted, text = self._wanted, self._as_text(chunk)
            first: str | Sequence[int] = chunk.tokens if text.text is None else text.text
            self._dialect = dialect_of(wanted.connection, wanted.api, wanted.top, wanted.model, wanted.extra, first)
            self._dialect.complete(
                first, 1, echo=self._dialect.echoes is not False
            )  # whether it echoes decides what it is given
        if self._dialect.echoes:
            prompt = self._as_text(chunk)
            return prompt, self._server_reply(prompt, chunk.first)
        if self._takes_ids:
            prompt = Prompt(None, chunk.tokens, tuple(self._vocabulary.pieces[token] for token in chunk.tokens))
            try:
                return prompt, self._server_reply(prompt, chunk.first)
            except ServerError as error:
                if error.status not in _REFUSED or not self._as_text(chunk).text:
                    raise
                self._takes_ids = False
        prompt = self._as_text(chunk)
        return prompt, self._server_reply(prompt, chunk.first)

    def _server_reply(self, prompt: Prompt, first: int) -> ServerReply:
        assert self._dialect is not None
        return ask_server(
            self._dialect,
            prompt,
            self._vocabulary,
            lambda text: self._reference.tokenize(self._model, text).ids,
            0,
            self._progress,
            first=first,
        )

    def _as_text(self, chunk: Chunk) -> Prompt:
        """The chunk's text, with the tokens that llama.cpp makes of it; those of the chunk if there is such a text."""
        text = text_of(chunk.tokens, self._model, self._reference)
        ids = self._reference.tokenize(self._model, text)
        return Prompt(text, ids.ids, ids.pieces)


def text_of(tokens: Sequence[int], model: Path, reference: Reference) -> str:
    """A text of which llama.cpp makes these tokens, a BOS included, or nearly so."""
    special = reference.tokenize(model, "a")
    shown = tokens[1:] if special.add_bos and tokens[:1] == (special.bos,) else tokens
    text = reference.text(model, shown)
    texts = dict.fromkeys((text, text.lstrip(" ")))
    return next((item for item in texts if reference.tokenize(model, item).ids == tuple(tokens)), text)
