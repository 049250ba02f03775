"""How much of each point's rows a comparison saw."""

from collections.abc import Sequence

import numpy as np

from checkpoints.answers.diff import Seen

from .align import Pair
from .whole_rows import sizes


def seen(pair: Pair) -> Seen:
    """For one point: the fewest values that both sides have of a row, and what covers the rest of it."""
    ours, ref = pair.ours, pair.ref
    known = np.where(np.isnan(sizes(ref)), sizes(ours), sizes(ref))
    of = None if np.isnan(known).any() or not len(known) else int(known.max())
    values = int(np.minimum(ours.counts, ref.counts).min(initial=2**62)) if len(ours) else 0
    if of is not None and bool((np.minimum(ours.counts, ref.counts) >= known).all()):
        values = of  # rows that grow with the position are complete
    # With printed decimals sketches and sums mean nothing: they may differ because of the printing.
    exact = ours.quantum is None and ref.quantum is None
    sketch = exact and all(side.sketch is not None and not np.isnan(side.sketch).any() for side in (ours, ref))
    whole = exact and all(
        name in side.stats and not np.isnan(side.stats[name]).any() for side in (ours, ref) for name in ("l2", "sum")
    )
    return Seen(ours.point, values, of, sketch, whole)


def unseen(points: Sequence[Seen]) -> list[Seen]:
    """The points of which a part of each row was not seen."""
    return [point for point in points if not point.whole]
