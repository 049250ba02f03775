"""Names that are not points, with the nearest names that are."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from .points import ENCODER, KINDS, MODEL_KINDS, in_layer, in_vocabulary

_LISTED = 4
_WORDS = re.compile(r"(?:model|transformer|layers?|blocks?|blk|h)(?=[._\[-]|\d|$)")


def unknown_names(names: Iterable[str]) -> tuple[str, ...]:
    """One sentence on the names that are not points of the vocabulary, or nothing."""
    unknown = [name for name in names if not in_vocabulary(name)]
    if not unknown:
        return ()
    listed = []
    for name in unknown[:_LISTED]:
        near = nearest(name)
        listed.append(name + (f" (nearest: {', '.join(near)})" if near else ""))
    more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
    return (
        f"not in the vocabulary: {', '.join(listed)}{more}; where `parity model M` does not list them as the reference's own, --map can "
        "say what they mean",
    )


def nearest(name: str, count: int = 2) -> Sequence[str]:
    """The points that look most like a foreign name: nearest("layer_5_attn_output") begins with "blk.5.attn_out"."""
    if name.startswith(ENCODER):
        return [ENCODER + near for near in nearest(name.removeprefix(ENCODER), count)]
    number = re.search(r"\d+", name)
    stem = _WORDS.sub("", name[: number.start()] + name[number.end() :] if number else name).strip("._-[]")
    kinds = [kind for kind in KINDS if number is None or kind not in {once.name for once in MODEL_KINDS}]
    matches = get_close_matches(stem, kinds, n=count, cutoff=0.5)  # below one half even unrelated names match
    return [in_layer(int(number[0]), kind) if number else kind for kind in matches]
