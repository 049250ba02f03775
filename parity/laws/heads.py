"""How many heads the rows of a point consist of."""

from collections.abc import Mapping

from engine.graph import History, Step

_HANDED_ON = 2  # readers that are followed to learn how many heads a row has: v is read by the cache, the cache by attention


def heads_of(steps: Mapping[str, Step], point: str) -> int | None:
    """How many heads the rows of a point consist of, by the operation that makes it, or one that reads it, directly or through others."""
    heads = steps[point].params.get("heads")
    if isinstance(heads, int):
        return heads
    names = {point}
    for _ in range(_HANDED_ON):
        for step in steps.values():
            for at, name in enumerate(step.names):
                heads = step.params.get("kv_heads" if at and "kv_heads" in step.params else "heads")
                if name in names and isinstance(heads, int):
                    return heads
        names = {step.makes for step in steps.values() for read in step.reads if isinstance(read, History) and read.of in names}
    return _heads_of_scores(steps, point) if point.endswith(".kqv_out") else None


def _heads_of_scores(steps: Mapping[str, Step], point: str) -> int | None:
    scores = steps.get(f"{point.rpartition('.')[0]}.kq")
    heads = None if scores is None else scores.params.get("heads")
    return heads if isinstance(heads, int) else None
