"""What of the points and positions that were asked for was never compared: agreement says nothing about it."""

from collections.abc import Collection, Sequence

from checkpoints.answers.diff import Uncompared


def uncompared(
    asked: Sequence[str], compared: Collection[str], positions: Collection[int], compared_positions: Collection[int]
) -> Uncompared:
    """Which of the points that were asked for, in dataflow order, and of the positions were compared nowhere."""
    lacking = tuple(name for name in asked if name not in compared)
    last = next((name for name in reversed(asked) if name in compared), "")
    return Uncompared(
        len(asked),
        lacking,
        tuple(sorted(set(positions) - set(compared_positions))),
        last if lacking and last != asked[-1] else "",
    )
