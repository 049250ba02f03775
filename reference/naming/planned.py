"""A value to take from a pass, and how its node is recognised in the next pass."""

import re
from collections import Counter

from msgspec import Struct

from ..jobs import Node

Signature = tuple[str, str, str, int]

VIEWS = frozenset({"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})


class Planned(Struct, frozen=True):
    """A value to take.

    Attributes:
        node: the node, with the point that it stands for.
        signature: how the node is recognised in another pass.
        operand: None for the node's own value, a number for that of one of its sources.
        part: first element and end (exclusive) in the innermost dimension, if the value is a part of the node's; None for all.
        once: whether a pass has it only once, at its last position, as a state.
        axis: ggml's dimension that counts the positions, None while it is not known or if there is none.
    """

    node: Node
    signature: Signature
    operand: int | None = None
    part: tuple[int, int] | None = None
    once: bool = False
    axis: int | None = None

    @property
    def point(self) -> str:
        """The canonical name."""
        return self.node.point


class Signer:
    """Gives each node of one pass through a graph its signature; the same graph always gives the same signatures."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[str, str, str]] = Counter()

    def sign(self, name: str, op: str, first: str) -> Signature:
        """(name, operation, first operand, occurrence), without the numbers that ggml gives to unnamed nodes."""
        stem = (_anonymous(name), op, _anonymous(first))
        self._seen[stem] += 1
        return (*stem, self._seen[stem])


def _anonymous(name: str) -> str:
    return re.sub(r"^(node|leaf)_\d+", r"\1", name) if name.startswith(("node_", "leaf_")) else name
