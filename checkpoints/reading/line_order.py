"""Records without a position: if an engine prints one line per point and pass, the order of the lines gives it."""

from collections.abc import Mapping

import numpy as np
from msgspec.structs import replace

from ..errors import DumpError
from ..record import Rows

UNNUMBERED = -1  # token_idx of a record whose line has none, until `counted` gives it one
_LISTED = 4


def counted(rows: Rows, path: str) -> Rows:
    """The rows of one point [R]; if no line has a position, the rows of each sequence are numbered from 0 in the file's order.

    Raises:
        DumpError: some of the lines have a position and others do not.
    """
    unnumbered = rows.token_idx == UNNUMBERED
    if not unnumbered.any():
        return rows
    if not unnumbered.all():
        raise DumpError(
            f"{path}: {np.count_nonzero(unnumbered)} of {len(rows)} records of {rows.point} have no token_idx.",
            "Print the token's position, from 0, in each line or in none: without it, positions are counted by the order of the lines.",
            code="record",
        )
    order = np.argsort(rows.seq, kind="stable")  # sequence by sequence, each in the file's order
    in_order = rows.seq[order]
    first = np.searchsorted(in_order, in_order)  # where the sequence of each begins
    token_idx = np.empty(len(rows), dtype=np.int64)
    token_idx[order] = np.arange(len(rows)) - first
    return replace(rows, token_idx=token_idx)


def note_on(counts: Mapping[str, int], points: int) -> str:
    """The note on a dump of `points` points, of which some were numbered by order: their names and numbers of records."""
    most = max(counts.values())
    listed = ", ".join([*list(counts)[:_LISTED], *["…"] * (len(counts) > _LISTED)])
    lacking = "no line has" if len(counts) == points else f"lines of {listed} lack"
    note = f"{lacking} a token_idx: a point's first line is taken as position 0, its second as 1, … up to {most - 1}"
    fewer = [name for name, count in counts.items() if count < most]
    if fewer:
        note += f" ({fewer[0]} has only {counts[fewer[0]]}: of which positions?)"
    return note
