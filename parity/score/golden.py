"""A folder of golden dumps as the base of a score: its prompts are the text, its whole rows of logits the predictions."""

from msgspec import Struct

from checkpoints.errors import DumpError, InputError

from ..drift.golden import Golden, GoldenPrompt
from .predictions import Rows, whole_rows
from .text import Chunk


class GoldenPredictions(Struct, frozen=True):
    """What golden dumps predict: a chunk is a prompt with the tokens that were generated after it."""

    golden: Golden
    prompts: tuple[GoldenPrompt, ...]
    vocabulary: int

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"golden dumps of {self.golden.folder.name} ({self.golden.source})"

    def rows(self, chunk: Chunk) -> Rows:
        """(position, logits [V]) of the scored positions, in order.

        Raises:
            DumpError: a position has no row of logits, or not all of its values.
        """
        path = self.golden.path(self.prompts[chunk.number])
        advice = f"Record them with `parity drift record --points logits --slice {self.vocabulary}`."
        try:
            yield from whole_rows(path, chunk, self.vocabulary, f"{path} has", advice)
        except DumpError as error:
            raise DumpError(error.message, advice, code=error.code) from error


def chunks_of(golden: Golden, most: int | None) -> tuple[list[Chunk], tuple[GoldenPrompt, ...]]:
    """Its prompts of two tokens and more as chunks, all of whose positions are scored, and the prompts themselves.

    Raises:
        InputError: no prompt has a token to predict.
    """
    prompts = tuple(prompt for prompt in golden.prompts if len(prompt.tokens) + len(prompt.generated) > 1)[:most]
    if not prompts:
        raise InputError(f"no prompt of {golden.folder} has a token to predict.", "Record longer prompts.", code="golden")
    return [Chunk(number, (*prompt.tokens, *prompt.generated), 0) for number, prompt in enumerate(prompts)], prompts
