"""What of the points and positions that were asked for was never compared: agreement says nothing about it."""

from collections.abc import Collection, Sequence

from checkpoints.answers.diff import Uncompared
from checkpoints.points import in_vocabulary


def uncompared(
    requested: Sequence[str], compared: Collection[str], positions: Collection[int], compared_positions: Collection[int]
) -> Uncompared:
    """Which of the points that were asked for, in dataflow order, and of the positions were compared nowhere.

    Nodes of llama.cpp's that are not in the vocabulary do not count: other engines need not have them.
    """
    requested = [name for name in requested if in_vocabulary(name)]
    lacking = tuple(name for name in requested if name not in compared)
    last = next((name for name in reversed(requested) if name in compared), "")
    return Uncompared(
        len(requested),
        lacking,
        tuple(sorted(set(positions) - set(compared_positions))),
        last if lacking and last != requested[-1] else "",
    )
