"""Why records are suspected, but not their operations, as `parity explain` says it."""

from collections.abc import Sequence

from checkpoints.answers.explain import SuspectRecord
from checkpoints.points import parse
from checkpoints.printable import first_names

from .sentences import by_distance, in_layers


def suspected(suspects: Sequence[SuspectRecord]) -> list[str]:
    """One sentence for all that show the same other order, and one for records of several layers of which the same is to be said."""
    sentences: dict[str, str] = {}
    alone: dict[str, list[int | None]] = {}
    for suspect in suspects:
        alike = [other for other in suspects if suspect.shows and other.shows == suspect.shows]
        if alike:
            sentences[suspect.shows] = _otherwise(alike)
            continue
        layer = parse(suspect.checkpoint).layer
        sentence = by_distance(_alone(suspect), layer)
        alone.setdefault(sentence, []).append(layer)
        sentences[sentence] = in_layers(sentence, tuple(number for number in alone[sentence] if number is not None))
    return list(sentences.values())


def _otherwise(suspects: Sequence[SuspectRecord]) -> str:
    """Which records show another order of elements, and what shows that their operations are right."""
    names = first_names([suspect.checkpoint for suspect in suspects], 8)
    agreeing = list(dict.fromkeys(name for suspect in suspects for name in suspect.agreeing))
    return (
        f"{names}: recorded as {suspects[0].shows}; {first_names(agreeing)}, computed from {'it' if len(suspects) == 1 else 'them'}, "
        f"{'agrees' if len(agreeing) == 1 else 'agree'}: the record's order, not the engine's (parity diff gives the --map line)"
    )


def _alone(suspect: SuspectRecord) -> str:
    """Why a record is suspected, but not its operation."""
    agreeing = " and ".join(suspect.agreeing[:3]) + (" and more" if len(suspect.agreeing) > 3 else "")
    agrees, would = ("agrees", "it would not") if len(suspect.agreeing) == 1 else ("agree", "they would not")
    return (
        f"{suspect.checkpoint} alone differs: {agreeing}, computed from it, {agrees}, and {would} if the engine had continued with "
        "these values: the record shows another layout, moment or point than its name says"
    )
