"""The other ways in which a side can compute a prompt: in portions, ubatches, among other sequences, from a saved state."""

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.errors import InputError

from ..run.command import PORTIONS, SEQUENCES, STATE, UBATCH
from ..run.request import Prompt
from ..run.sides import ExternalEngine, OurEngine, Side

WAYS = {
    PORTIONS: "portions", UBATCH: "ubatch sizes", SEQUENCES: "several sequences in a batch", STATE: "saved and restored state",
}  # fmt: skip
_OURS = {
    UBATCH: "does not cut a pass further",
    SEQUENCES: "keeps one sequence on the device in this mode",
    STATE: "keeps its state on the device in this mode",
}


def possible_ways(side: Side, prompt: Prompt) -> frozenset[str]:
    """The ways of computing that a side knows for a prompt.

    Raises:
        InputError: an engine would have to know what an encoder–decoder's decoder reads.
    """
    if not prompt.decoded or isinstance(side, OurEngine):
        return side.ways
    if isinstance(side, ExternalEngine):
        raise InputError(
            "--exec cannot tell an engine which tokens the decoder of an encoder–decoder reads.",
            "Dump the decoder's tokens twice, in one pass and one by one: parity consistency A B.",
            code="encoder-decoder",
        )
    return side.ways & {PORTIONS}


def why_not(side: Side, way: str) -> str:
    """Why a way of computing is not checked."""
    if isinstance(side, OurEngine):
        return f"{side.name} {_OURS[way]}"
    if isinstance(side, ExternalEngine):
        return f"{side.name} is not told about them; put {way} into --exec"
    return f"{side.name} encodes a prompt at once, and a state does not hold what came of it"


def described_whole(prompt: Prompt) -> str:
    """How a prompt is computed as a whole, in words."""
    return f"{'the decoder over' if prompt.decoded else 'a prefill of'} {len(prompt.ids)}"


def with_another_last(prompt: Prompt, vocabulary: int) -> Prompt:
    """The prompt with another last token, of those that come one after the other."""
    if prompt.decoded:
        return replace(prompt, decoded=(*prompt.decoded[:-1], (prompt.decoded[-1] + 1) % vocabulary))
    return replace(prompt, ids=(*prompt.ids[:-1], (prompt.ids[-1] + 1) % vocabulary), pieces=())


def other_ways(ways: Collection[str], prompt: Prompt, chunk: int) -> Iterator[tuple[str, Prompt, str]]:
    """(name, the prompt computed another way, a description), for each way that the side supports."""
    ids, count = prompt.ids, len(prompt.ids)
    if PORTIONS in ways:
        for name, portions in _portions(count, chunk).items():
            yield name, replace(prompt, portions=tuple(portions)), portions_text(portions)
    if UBATCH in ways:
        for size in dict.fromkeys((1, chunk)):
            if size < count:
                yield f"ubatches of {size}", replace(prompt, ubatch=size), f"a pass in ubatches of {size}"
    if SEQUENCES in ways:  # a shorter one, the same one, a longer one
        # Other tokens in the shorter and the longer one: whoever reads a neighbour's keys must not find its own there.
        half, other = (count + 1) // 2, ids[::-1]
        companions = (other[:half], ids, (*other, *ids[:half]))
        yield (
            "among other sequences",
            replace(prompt, companions=companions),
            "the last of four sequences, one of them the same,",
        )
    if STATE in ways:
        saved = count // 2
        yield (
            "a restored state",
            replace(prompt, saved=saved),
            f"{saved} tokens, a state that is saved and restored, {count - saved} more,",
        )


def way_of(prompt: Prompt) -> str:
    """The placeholder that requests the way in which a prompt is computed."""
    return SEQUENCES if prompt.companions else STATE if prompt.saved else UBATCH if prompt.ubatch else PORTIONS


def _portions(count: int, chunk: int) -> dict[str, list[int]]:
    """Ways to compute `count` positions, by name."""
    ways = {"prefill and one step": [count - 1, 1], "one token at a time": [1] * count}
    if chunk < count:
        ways["chunks"] = [chunk] * (count // chunk) + ([count % chunk] if count % chunk else [])
    return ways


def starts_of(portions: Sequence[int]) -> NDArray[np.int64]:
    """The first position of each portion."""
    return np.cumsum([0, *portions[:-1]])


def portions_text(portions: Sequence[int]) -> str:
    """Portions as a title shows them: "4 × 3", "5 + 1", "4 + 5 × 1" for one pass of four tokens and five of one."""
    runs = [(size, len(list(same))) for size, same in groupby(portions)]
    texts = [str(size) if times == 1 else f"{times} × {size}" for size, times in runs]
    return " + ".join(texts) if len(texts) <= 4 else f"{texts[0]} + … + {texts[-1]}, {len(portions)} passes"
