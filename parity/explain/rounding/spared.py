"""Lower arithmetic spares nothing: where some records, or some elements of all records, are exactly right, the errors are not its
rounding."""

from ..records.records import Floats

# Of the records that rounding must have changed by at least this many times their limit, this share may be (nearly) exactly right:
# a single value can be right by luck, a whole position or point cannot.
VISIBLE, SPARED = 30.0, 0.01


def spares_records(errors: Floats, costs: Floats, limits: Floats) -> bool:
    """Whether records are exactly right that an arithmetic must have changed: NMSE, what it costs there, and the limit of each, [R]."""
    visible = costs > VISIBLE * limits
    return bool((visible & (errors <= limits)).sum() > SPARED * visible.sum())
