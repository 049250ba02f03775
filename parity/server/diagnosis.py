"""Why a server's predictions over a chunk of text are not llama.cpp's: the causes that `parity run --server` names, for `parity score`."""

from pathlib import Path

from checkpoints.answers.server import ServerCause
from reference.client import Reference
from reference.jobs import EXACT

from ..run.request import Prompt
from .ask import ServerReply
from .base import floor_of, kl, listed, rows
from .case import ServerCase
from .causes import cause_of
from .limits import limit_of
from .sample import Sample
from .vocabulary import Vocabulary

_POSITIONS = 32  # asked positions of the chunk among which the sample is taken: each further one lengthens llama.cpp's passes


def diagnose(
    reference: Reference, model: Path, prompt: Prompt, reply: ServerReply, vocabulary: Vocabulary
) -> ServerCause | None:
    """The cause that explains the first predictions of a chunk; None if they are llama.cpp's, or nothing explains them.

    Positions at which the server names no token of the model are left out.
    """
    placed = [item for item in reply.placed if any(vocabulary.ids(candidate) for candidate in item.candidates)][:_POSITIONS]
    if not placed:
        return None
    tokens = reply.tokens[: placed[-1].position + 1]
    limit = limit_of(floor_of(reference, model, tokens, placed[0].position))
    by_position = {item.position: item for item in placed}
    sample = Sample(placed)
    for position, row in rows(reference, model, tokens, placed[0].position, EXACT):
        item = by_position.get(position)
        if item is not None:
            sample.add(item, row, wrong=kl(row, listed(item.candidates, vocabulary, row)) > limit)
    case = ServerCase(
        reference,
        model,
        EXACT,
        prompt,
        ServerReply(tokens, len(prompt.ids), tuple(placed), reply.echoed, reply.prompt_tokens),
        reference.tokenize(model, "a"),
        vocabulary,
        sample.kept,
        limit,
    )
    return cause_of(case) if case.without(sample.kept) > case.limit else None
