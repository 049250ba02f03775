"""What to record of a prompt: the same terms for every side, from the command line to the code that computes."""

from itertools import accumulate
from typing import Any, Literal

from msgspec import Struct

from .errors import InputError
from .record import DEFAULT_SLICE

Positions = Literal["all", "last"] | tuple[int, ...]


class Recording(Struct, frozen=True, kw_only=True):
    """What a side is to record; requests and jobs extend this by what they need themselves.

    Attributes:
        mode: "exact" computes in float32 (llama.cpp its F32 twin), "native" the file as it is.
        points: a `--points` expression: "default", "all", names, globs.
        layers: the layers whose output "default" stands for; None for 0, 5, 10, 23 and the last.
        positions: "all", "last" (of each forward pass), or positions in the sequence.
        slice_size: leading values in each record; None for all of them.
        full: write whole tensors beside the dump, as safetensors.
        binary: write records as arrays beside the dump's lines (`checkpoints.columns`).
        first_position: the position of the first token, so that long contexts can be tried without a long prompt.
    """

    mode: str = "exact"
    points: str = "default"
    layers: tuple[int, ...] | None = None
    positions: Positions = "all"
    slice_size: int | None = DEFAULT_SLICE
    full: bool = False
    binary: bool = False
    first_position: int = 0

    def recording(self) -> dict[str, Any]:
        """These fields by name, to make another request or job that records the same."""
        return {name: getattr(self, name) for name in Recording.__struct_fields__}


def passes(count: int, portions: tuple[int, ...] = ()) -> list[slice]:
    """Which of `count` prompt tokens each forward pass takes: as many as `portions` says, or all of them in one.

    Raises:
        InputError: the portions do not add up to `count` tokens.
    """
    portions = portions or (count,)
    if sum(portions) != count or min(portions) < 1:
        raise InputError(
            f"portions of {', '.join(map(str, portions))} tokens do not make up a prompt of {count}.",
            "Give portions of 1 or more tokens that add up to the prompt.",
            code="portions",
        )
    return [slice(end - size, end) for end, size in zip(accumulate(portions), portions, strict=True)]
