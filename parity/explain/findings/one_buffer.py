"""Points that show what a later layer computed: they were captured from one buffer, so that their own values were not seen."""

from checkpoints.points import parse
from checkpoints.printable import listed

from ...diff.readings.same_vector import alike
from ..case import Case


def shown_instead(case: Case) -> dict[str, str]:
    """Wrong points whose wrong records are those of a point of a later layer, or behind all layers, and which point that is.

    Points that are one vector in a right engine as well do not count, nor those that show an earlier point that agrees, too: the layers
    between do nothing.
    """
    numbers = {entry.point: number for number, entry in enumerate(case.entries)}
    instead: dict[str, str] = {}
    for number, entry in enumerate(case.entries):
        if not entry.over.any():
            continue
        ours, right = (side.take(entry.over.nonzero()[0]) for side in (entry.pair.ours, entry.pair.ref))
        same = alike(entry.point, right, {other.point: other.pair.ref for other in case.entries})
        others = [other for other in alike(entry.point, ours, case.dump.points) if other in numbers and other not in same]
        later = [other for other in others if numbers[other] > number and parse(other).layer != parse(entry.point).layer]
        idle = any(numbers[other] < number and not case.entries[numbers[other]].over.any() for other in others)
        if later and not idle:
            instead[entry.point] = later[-1]
    return instead


def in_words(instead: dict[str, str]) -> str:
    """The note that these points were left out."""
    names = list(instead)
    shows, own = ("shows", "its own value was") if len(names) == 1 else ("show", "their own values were")
    return (
        f"captured from one buffer: {listed(names)} {shows} {listed(list(dict.fromkeys(instead.values())))}, which is computed "
        f"later: {own} not seen, and what else differs is explained without {'it' if len(names) == 1 else 'them'}"
    )
