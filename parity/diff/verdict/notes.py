"""Notes on a comparison: other settings, printed digits, values that are not finite, rows of other lengths."""

import numpy as np
from numpy.typing import NDArray

from checkpoints.printable import first_names
from checkpoints.record import Dump, Header

from ..measured.align import Pair
from ..measured.measure import Measures
from ..measured.whole_rows import sizes
from ..readings.routing import is_routing


def notes_on(ours: Dump, ref: Dump, pairs: tuple[Pair, ...], measures: Measures) -> list[str]:
    """Everything about two dumps that limits what their comparison shows, a sentence each."""
    notes = [f"{dump.path}: {note}" for dump in (ours, ref) for note in dump.notes]
    left, right = ours.header, ref.header
    if left is not None and right is not None:
        for what, a, b in _settings(left, right):
            if a and b and a != b:
                looser = "; the looser limits, those of native mode, apply" if what == "mode" else ""
                notes.append(f"{what}: ours {a}, the reference {b}{looser}")
    printed = _printed_steps(pairs)
    if printed.any():
        records = "" if printed.all() else f"{np.count_nonzero(printed):,} of {len(printed):,} records' "
        notes.append(
            f"{records}values are printed in steps of up to {printed.max():.0e}: smaller differences cannot be seen there"
            " (%.9g prints all digits)"
        )
    both = np.flatnonzero((measures.nonfinite_ours > 0) & (measures.nonfinite_ref > 0))
    if len(both):
        ends = np.cumsum([len(pair.ours) for pair in pairs])
        first = pairs[int(np.searchsorted(ends, both[0], side="right"))].point
        notes.append(
            f"NaN or infinities on both sides in {len(both)} records, the first at {first}: those elements are not compared"
        )
    other = [pair.point for pair in pairs if _lengths(pair)]
    if other:
        notes.append(f"the rows differ in length at {first_names(other, 3)}: leading values are compared")
    return notes


def _printed_steps(pairs: tuple[Pair, ...]) -> NDArray[np.float64]:
    """The widest step of the printed digits of either side, by record: 0 where both give every float32, and for ids of experts.

    A step below that from one float32 to the next hides nothing: in a row of two values, `%.9g` may print both with nine decimals.
    """
    steps = [np.zeros(len(pair.ours)) for pair in pairs]
    for pair, step in zip(pairs, steps, strict=True):
        for side in (pair.ours, pair.ref):
            if side.quantum is not None and not is_routing(pair):
                with np.errstate(invalid="ignore"):
                    hidden = np.where(side.quantum > np.spacing(np.abs(side.values)), side.quantum, 0.0)
                np.maximum(step, hidden.max(axis=1, initial=0.0), out=step)
    return np.concatenate(steps) if steps else np.zeros(0)


def _settings(left: Header, right: Header) -> list[tuple[str, str, str]]:
    # Fingerprints are more reliable, and a foreign side may give its file's path (the twin's, for instance) as the name.
    paths = any(header.model.name.endswith(".gguf") for header in (left, right))
    named = not (left.model.fingerprint and right.model.fingerprint) and not paths
    return [
        ("mode", left.mode, right.mode),
        ("KV type", left.kv_type, right.kv_type),
        *([("model", left.model.name, right.model.name)] if named else []),
        ("architecture", left.model.architecture, right.model.architecture),
        ("layers", str(left.model.layers or ""), str(right.model.layers or "")),
    ]


def _lengths(pair: Pair) -> bool:
    """Whether the sides state different lengths for a point's rows."""
    a, b = sizes(pair.ours), sizes(pair.ref)
    return bool(np.any((a != b) & ~np.isnan(a) & ~np.isnan(b)))
