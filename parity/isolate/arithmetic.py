"""In which arithmetic a foreign engine computes, if it does not say: what its products with weights show together.

Every engine is judged in float32 first. Lower arithmetic is granted only if products are off everywhere, and only as far as they are off.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.diff import Limits
from checkpoints.answers.isolate import NOT_OBSERVABLE, WRONG, Operation
from engine.replay.wide import coarse_points

from ..diff.against_limits import TABLE
from ..diff.limits import limits
from .bench import IsolationBench

# One operation of a right engine in F16, BF16 or TF32 (products rounded, all values rounded, or sums in F16; 29 models of all types)
# was at most 4 times as far off as the median product with weights, scores 12 times; twice that, in round numbers.
SPREAD = 25.0
_SOURCE = f"lower arithmetic: {SPREAD:g} times what the median product is off"
_FEWEST = 3  # products that are off: fewer do not show an arithmetic
_REASON = (
    "its error has the size of F16 or BF16 arithmetic, and too few products were recorded whole to tell (--compute f32 judges exactly, "
    "--compute f16 or bf16 allows for it)"
)
_MOST = limits(None, None, compute="bf16").operations  # of the lowest arithmetic in floating point


class Judgement(Struct, frozen=True):
    """Operations judged by a limit.

    `source` says where the limit is from; `of_layers` is that of a whole layer beside llama.cpp's.
    """

    bench: IsolationBench
    operations: list[Operation]
    passes: int
    limit: float
    source: str = ""
    of_layers: float = 0.0


def in_its_arithmetic(judged_at: Callable[[float], Judgement], allowed: Limits, exact: float, source: str) -> Judgement:
    """The operations, judged in float32, or in the lower arithmetic that their products show.

    If they do not show any, wrong ones that lower arithmetic may explain are not observable.

    Args:
        judged_at: judges them by a limit. allowed: the limits of the arithmetic that is stated, else of the lowest that is granted.
        exact, source: the limit of one operation in float32, and where it is from.
    """
    most = allowed.operations
    if most > _MOST and not allowed.assumed:  # eight bits are stated: which products agree shows nothing
        return replace(judged_at(most), source=allowed.source, of_layers=most)
    judgement = judged_at(exact)
    bench = judgement.bench
    shown = exact if most <= exact else shown_limit(judgement.operations, bench.products, bench.rounding, exact, most)
    if shown == exact and (allowed.assumed or most <= exact):
        of_layers = max(exact, TABLE) if coarse_points(bench.steps) else exact
        return replace(judgement, source=source, of_layers=of_layers)
    if shown is None and allowed.assumed:
        operations = _undecided(judgement.operations, most)
        return replace(judgement, operations=operations, limit=most, source=allowed.source, of_layers=most)
    if shown is None or shown == exact:  # an arithmetic that is stated may be that of single operations
        return replace(judged_at(most), source=allowed.source, of_layers=most)
    return replace(judged_at(shown), source=allowed.source if shown == most else _SOURCE, of_layers=most)


def shown_limit(
    operations: Sequence[Operation], products: Collection[str], rounding: Mapping[str, float], exact: float, most: float
) -> float | None:
    """The limit of one operation in the arithmetic that the operations show: `exact` for float32; None if they do not show any.

    Args:
        operations: judged in float32. products: the names of products with weights. rounding: of those that round their
            activations as ggml does, what that costs: NMSE.
        exact, most: the limits of one operation in float32 and in the lowest arithmetic that is granted.
    """
    judged = [operation for operation in operations if operation.nmse is not None and operation.name in products]
    # What rounds activations to 8 bits as ggml does is right, and says nothing about attention; what rounds them to F16 or BF16 computes
    # in that type. Products with weights of other types may round in another way.
    eight_bits = {operation.weight for operation in judged if operation.name in rounding} - {"F16", "BF16"}
    others = [operation for operation in judged if operation.weight not in eight_bits]
    errors = np.array([rounding.get(operation.name, operation.nmse) for operation in others], dtype=np.float64)
    off = errors[errors > exact]
    wrong = [operation for operation in operations if operation.status == WRONG]
    if wrong and 2 * (len(judged) - len(others)) >= len(judged) and all(operation in others for operation in wrong):
        return None  # most products round to 8 bits, and those with other weights may do so, too
    if wrong and not len(errors) and not any(operation.name in products for operation in wrong):
        return None  # norms and attention compute in a type that no product shows
    if not wrong or 2 * len(off) < max(len(errors), 1):
        return exact
    return min(most, SPREAD * float(np.median(off))) if len(off) >= _FEWEST else None


def _undecided(operations: Sequence[Operation], most: float) -> list[Operation]:
    """The operations; wrong ones that lower arithmetic may explain are not observable."""
    return [
        replace(operation, status=NOT_OBSERVABLE, reason=_REASON)
        if operation.status == WRONG and operation.nmse is not None and operation.nmse <= most
        else operation
        for operation in operations
    ]
