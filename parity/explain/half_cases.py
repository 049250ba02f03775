"""The two halves of an encoder–decoder's dump, each a case of its own: the encoder beside the right encoder, the decoder fed by one."""

from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.points import ENCODER
from checkpoints.record import Dump
from engine.backend import Array
from engine.faults import as_recorded
from engine.graph import Step
from engine.halves import decoder_alone, encoder_alone, handed_over
from engine.replay.precision import rounded
from engine.replay.replay import Replay
from engine.transformer import Transformer

from ..arbiter.arbiter import Arbiter
from .case import Case, ExplainOptions, Half
from .records.comparable import generated_of, prompt_of
from .search.state import SearchState


def encoder_case(dump: Dump, transformer: Transformer, options: ExplainOptions) -> Case | None:
    """The encoder's half of a dump; None where it was not recorded.

    Raises:
        ParityError: as `Case` does.
    """
    points = {name: rows for name, rows in dump.points.items() if name.startswith(ENCODER)}
    if not points:
        return None
    plain = {name.removeprefix(ENCODER): replace(rows, point=name.removeprefix(ENCODER)) for name, rows in points.items()}
    half = Half(_with_steps(transformer, encoder_alone(transformer.encoder or ())))
    return Case(replace(dump, points=plain, tokens=()), half, options)


def decoder_case(
    dump: Dump,
    transformer: Transformer,
    options: ExplainOptions,
    encoder: Case | None = None,
    best: SearchState | None = None,
    own: Mapping[str, NDArray[np.float32]] | None = None,
) -> Case | None:
    """The decoder's half of a dump, fed by the right encoder or the one that a state describes; None where it was not recorded.

    `own` is what the dump's own encoder made, where the decoder is to be fed by that.

    Raises:
        ParityError: as `Case` does.
    """
    points = {name: rows for name, rows in dump.points.items() if not name.startswith(ENCODER)}
    if not points:
        return None
    encoder_steps = transformer.encoder or ()
    steps = encoder_alone(encoder_steps) if best is None else as_recorded(best.steps)
    prompt = prompt_of(dump, options.tokens) if encoder is None else encoder.tokens
    computed = transformer.weights, transformer.backend
    numbers, passes = range(len(prompt)), [0] * len(prompt)
    values = Replay(steps, prompt, numbers, passes, *computed).values
    truth = Arbiter(steps, *computed, prompt, numbers, passes)
    names = handed_over(encoder_steps)

    def lower(kind: str, storage: bool) -> dict[str, Array]:
        values = Replay(rounded(steps, kind, storage=storage), prompt, numbers, passes, *computed).values
        return {name: values[plain] for name, plain in names.items()}

    half = Half(
        _with_steps(transformer, decoder_alone(encoder_steps, transformer.steps)),
        {name: values[plain] for name, plain in names.items()},
        lambda variant: {name: truth.value(plain, variant) for name, plain in names.items()},
        lower,
        frozenset(name for name, plain in names.items() if plain in truth.coarse),
    )
    if own is not None:
        given = {name: transformer.backend.array(value) for name, value in own.items()}
        half = Half(half.transformer, given, lambda _: own, lambda _kind, _storage: given)
    start = (transformer.decoder_start or 0,)
    header = None if dump.header is None else replace(dump.header, tokens=start, prompt=None)
    part = replace(dump, points=points, header=header)
    return Case(part, half, replace(options, tokens=(*start, *generated_of(dump))))


def _with_steps(transformer: Transformer, steps: Sequence[Step]) -> Transformer:
    """The same weights with the steps of one half."""
    half = copy(transformer)
    half.steps, half.single, half.encoder = list(steps), None, None
    return half
