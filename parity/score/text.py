"""A text as chunks of token ids, cut and scored as llama-perplexity does."""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from checkpoints import regular
from checkpoints.errors import InputError
from reference.client import Reference

_LARGEST = 1 << 28  # bytes of a text: a hundred times what perplexity is measured on


class Chunk(Struct, frozen=True):
    """One stretch of the text that is computed by itself, from position 0 on.

    `first` is the first position whose prediction is scored: of the token after it. Earlier ones have too little context.
    """

    number: int
    tokens: tuple[int, ...]
    first: int

    @property
    def scored(self) -> range:
        """Positions whose prediction of the next token is scored."""
        return range(self.first, len(self.tokens) - 1)


def chunks(reference: Reference, model: Path, text: str, context: int, most: int | None = None) -> tuple[list[Chunk], int]:
    """The chunks of a text, and how many tokens it has.

    As in llama.cpp's perplexity tool (`perplexity.cpp`): the text's ids in stretches of `context`, without the remainder; if the
    vocabulary wants a BOS, each stretch's first id is replaced by it; predictions of the second half are scored.

    Raises:
        InputError: the context is too small, or the text too short for one chunk.
    """
    if context < 4:
        raise InputError(f"--context {context} is too small to score anything.", "Use --context 64 or more.", code="context")
    ids = reference.tokenize(model, text)
    if ids.n_ctx_train and context > ids.n_ctx_train:
        raise InputError(
            f"--context {context} is more than the {ids.n_ctx_train} positions that the model was trained for.",
            f"Use --context {ids.n_ctx_train}.",
            code="context",
        )
    count = len(ids.ids) // context
    if not count:
        raise InputError(
            f"the text has {len(ids.ids)} tokens, fewer than one chunk of {context}.",
            "Use a longer text, or a smaller --context.",
            code="text",
        )
    cut = []
    for number in range(min(count, most) if most is not None else count):
        tokens: Sequence[int] = ids.ids[number * context : (number + 1) * context]
        if ids.add_bos and ids.bos is not None:
            tokens = (ids.bos, *tokens[1:])
        cut.append(Chunk(number, tuple(tokens), context // 2))
    return cut, len(ids.ids)


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        InputError: it cannot be read, is not UTF-8, or holds nothing.
    """
    try:
        text = regular.read_text(path, _LARGEST)
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"cannot read {path}: {reason}.", "Check --text.", code="text") from error
    if not text.strip():
        raise InputError(f"{path} holds no text.", "Check --text.", code="text")
    return text
