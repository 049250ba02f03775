"""Whether a product agrees as float32 does before the first difference, which shows the arithmetic up to there."""

from checkpoints.answers.diff import AGREES

from ...diff.compare import Comparison
from ...diff.measured.operations import MIXING


def computed_before(compared: Comparison, first: str) -> str:
    """A product with weights before the first difference that agrees as float32 does; "" if there is none.

    Then the arithmetic is float32, or one in which this product is exact (`_untouched`).
    """
    model = compared.records.flow
    for point in compared.verdict.points:
        if point.checkpoint == first:
            break
        upstream = (
            {point.checkpoint, *_above(compared, point.checkpoint)}
            if point.checkpoint in model.whole.computations
            else set[str]()
        )
        if point.status == AGREES and MIXING & model.operations(upstream):
            return point.checkpoint
    return ""


def _above(compared: Comparison, name: str) -> set[str]:
    """All nodes that a point is made from."""
    makers = compared.records.flow.whole.computations
    every, waiting = set[str](), [name]
    while waiting:
        for other in makers[waiting.pop()].reads:
            if other not in every:
                every.add(other)
                waiting.append(other)
    return every
