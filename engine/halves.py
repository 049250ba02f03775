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
    """The steps of an encoder alone, with the names that they have in an encoder–decoder."""
    return _renamed(steps, lambda name: ENCODER + name)


def decoder_alone(encoder: Sequence[Step], decoder: Sequence[Step]) -> list[Step]:
    """A decoder's steps without its encoder: they read the values of `handed_over`, which must be given."""
    return [Step(ENCODED, handed_on, tuple(handed_over(encoder)), axis=None, inner=True), *decoder]


def handed_over(encoder: Sequence[Step]) -> dict[str, str]:
    """The encoder's last value and those that it is made from: their names, and the names that `encoder_alone` gives them."""
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
