"""The two halves of an encoder–decoder, each as the steps of a model by itself, with the names of one."""

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from checkpoints.points import ENCODER

from .backend import Array
from .graph import ENCODED, Step, alone, name_of, read_as


def encoder_alone(encoder: Sequence[Step]) -> list[Step]:
    """An encoder's steps without the prefix of their names."""
    return _renamed(alone(encoder), lambda name: name.removeprefix(ENCODER))


def as_encoder(steps: Sequence[Step]) -> list[Step]:
    """Such steps as those of the pass that an encoder–decoder begins with."""
    return _renamed(steps, lambda name: ENCODER + name)


def decoder_alone(encoder: Sequence[Step], decoder: Sequence[Step]) -> list[Step]:
    """A decoder's steps after an encoder that hands over what it makes: it reads the values of `handed_over`, which must be given."""
    return [Step(ENCODED, handed_on, tuple(handed_over(encoder)), axis=None, inner=True), *decoder]


def handed_over(encoder: Sequence[Step]) -> dict[str, str]:
    """What an encoder makes last and what that is made from: their names, and what `encoder_alone` calls them."""
    names = (encoder[-1].makes, *encoder[-1].names)
    return {name: name.removeprefix(ENCODER) for name in names}


def handed_on(encoded: Array, *_before: Array) -> Array:
    """What a decoder reads of its encoder: [E, D]."""
    return encoded


def _renamed(steps: Sequence[Step], rename: Callable[[str], str]) -> list[Step]:
    return [
        replace(step, makes=rename(step.makes), reads=tuple(read_as(read, rename(name_of(read))) for read in step.reads))
        for step in steps
    ]
