"""Two sets of RoPE frequency factors in one file: the length of a run's context decides which of them it uses.

Mirrors `llama_model::get_rope_factors`: the long ones if the context is longer than the one that the model was first trained for.
"""

from collections.abc import Collection

SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_PAD = 256  # llama_context rounds the context of a sequence up to it


def long_above(tensors: Collection[str], original: object) -> int | None:
    """The context above which the long factors are used, None if the file does not have both kinds.

    Args:
        tensors: the names of the file's tensors; original: the context length before it was extended, from the metadata.
    """
    return original if isinstance(original, int) and original > 0 and {SHORT, LONG} <= set(tensors) else None


def factors_of(positions: int, above: int) -> str:
    """The factors' tensor for a run of so many positions."""
    return LONG if -(-positions // _PAD) * _PAD > above else SHORT
