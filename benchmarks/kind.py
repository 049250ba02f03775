"""What a kind of engine is: an arithmetic or an algorithm, as a function from the right steps to the engine's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.graph import Step

Arithmetic = Callable[[Sequence[Step]], Sequence[Step]]


@dataclass(frozen=True)
class Kind:
    """A kind of engine.

    Attributes:
        compute: the arithmetic of its products: "f32", "f16", ….
        ways: in which engines compute it; one of them is drawn.
        exact: whether it is float32 throughout.
        without: the kinds of points that such an engine does not have.
        open_cache: whether its dumps leave open in which type its cache keeps keys and values.
        after: how many tokens are passes of their own behind the first pass, where the model can be cut into passes.
    """

    compute: str
    ways: tuple[Arithmetic, ...]
    exact: bool = False
    without: frozenset[str] = frozenset()
    open_cache: bool = False
    after: int = 0
