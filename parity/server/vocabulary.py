"""Which token a server means: by id, by bytes, or by its text."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from .predictions import TokenCandidate

BROKEN = "\ufffd"  # part of a character, which has no text by itself


class Vocabulary:
    """The pieces of a model's vocabulary, as `Reference.pieces` gives them."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = tuple(pieces)
        self._ids: dict[str, list[int]] = defaultdict(list)
        for number, piece in enumerate(self.pieces):
            self._ids[piece].append(number)

    def ids(self, candidate: TokenCandidate) -> Sequence[int]:
        """The tokens that a candidate can be; none if the vocabulary has no such piece.

        Some servers strip a leading blank, and part of a character is the same text for many tokens: such texts identify no token.
        """
        if candidate.id is not None:
            return (candidate.id,) if candidate.id < len(self.pieces) else ()
        text = candidate.data.decode("utf-8", "replace") if candidate.data is not None else candidate.text
        if text == "" or (BROKEN in text and len(self._ids.get(text, ())) != 1):
            return ()
        return self._ids.get(text) or self._ids.get(" " + text) or ()

    def most_probable(self, candidate: TokenCandidate, probability: Callable[[int], float]) -> int | None:
        """The token of a candidate: the most probable one of several with this text."""
        return max(self.ids(candidate), key=probability, default=None)

    def same(self, candidate: TokenCandidate, number: int) -> bool:
        """Whether the candidate can be this token."""
        return number in self.ids(candidate) or BROKEN in self.pieces[number] or candidate.text in ("", BROKEN)
