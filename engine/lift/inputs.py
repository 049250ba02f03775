"""The inputs that llama.cpp gives a graph, as values of the engine: each is computed by its rule, none copies the recorded data."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpoints import rules
from checkpoints.graph import Size, Tensor

from ..backend import Array, module_of
from ..graph import ENCODED, POSITIONS, TOKENS, Read, Step
from .operands import ONE, Unliftable, numpy_shape

if TYPE_CHECKING:
    from .lifted import GraphLifter


def read(lifter: "GraphLifter", tensor: Tensor) -> tuple[str, tuple[Size, ...]]:
    """The value that stands for an input, and its shape; if needed, a step is added that makes it from tokens or positions.

    Raises:
        Unliftable: the input follows no rule that the engine knows.
    """
    rule = tensor.rule
    if rule is None:
        raise Unliftable(f"its input {tensor.name} follows no known rule")
    if rule.kind == "tokens":
        return TOKENS, (lifter.t,)
    if rule.kind == "positions" and not rule.parameters:
        return POSITIONS, (lifter.t,)
    if rule.kind == "encoded":
        return ENCODED, tuple(size for size in numpy_shape(tensor.ne) if size != ONE)
    if rule.kind not in _STEPS:
        raise Unliftable(f"its input {tensor.name} (rule {rule.kind}) cannot be read here")
    operation, reads, shape = _STEPS[rule.kind](lifter, rule.parameters)
    name = "input." + ".".join(
        [rule.kind, *(f"{value:g}" if isinstance(value, float) else str(value) for value in rule.parameters.values())]
    )
    # The first rows of sections and masks differ from those of a shorter pass.
    axis = 0 if shape == (lifter.t,) else None
    return lifter.add_value(Step(name, operation, reads, (), dict(rule.parameters), axis=axis, inner=True)), shape


def of_lengths(lifter: "GraphLifter") -> str:
    """A value that only shows the lengths of pass and cache: the causal mask, [T, S]."""
    parameters = {"window": "causal", "size": 0}
    return lifter.add_value(Step("input.mask.causal.0", mask, (POSITIONS, lifter.keys), (), parameters, inner=True))


def sections(positions: Array, *, sections: int, zeros: int) -> Array:
    """The positions of M-RoPE's sections, one after the other: [T] -> [sections · T]; for text the last `zeros` sections are 0."""
    return np.concatenate([positions] * (sections - zeros) + [positions * 0] * zeros)


def temperature(positions: Array, *, floor: int, scale: float, offset: float) -> Array:
    """The factor of each query that grows with its position: [T] -> float32 [T]. `checkpoints.rules.temperature`."""
    xp = module_of(positions)
    host = positions if xp is np else xp.asnumpy(positions)
    return xp.asarray(rules.temperature(host, floor=floor, scale=scale, offset=offset))


def mask(positions: Array, key_positions: Array, *, window: str, size: int = 0, alibi: bool = False) -> Array:
    """0 (with ALiBi minus the distance) where a key is seen, −∞ elsewhere: [T], [S] -> float32 [T, S]."""
    seen = rules.visible(positions, key_positions, window=window, size=size)
    zero = positions[:, None].astype(np.float32) * np.float32(0)
    value = -abs(positions[:, None] - key_positions[None, :]).astype(np.float32) if alibi else zero
    return np.where(seen, value, np.float32(-np.inf))


def zeros(positions: Array, **_parameters: Any) -> Array:
    """The number 0: [T] -> [1]."""
    return positions[:1] * 0


def sees_encoded(positions: Array, encoded: Array) -> Array:
    """The mask of a decoder, which sees all of an encoder's rows: [T], [E, D] -> zeros, float32 [T, E]."""
    return module_of(encoded).zeros((len(positions), len(encoded)), np.float32)


def rotation(positions: Array, *, size: int) -> Array:
    """The Hadamard matrix that keys are rotated with: float32 [size, size]."""
    return module_of(positions).asarray(rules.hadamard(size))


def buckets(positions: Array, key_positions: Array, *, count: int, bidirectional: bool) -> Array:
    """T5's bucket of each distance: [T], [S] -> int32 [T, S]. `checkpoints.rules.buckets`, on the host."""
    xp = module_of(positions)
    host = (positions, key_positions) if xp is np else (xp.asnumpy(positions), xp.asnumpy(key_positions))
    return xp.asarray(rules.buckets(*host, count=count, bidirectional=bidirectional))


def last(positions: Array) -> Array:
    """The number of the last row: [T] -> [1]."""
    return positions[-1:] * 0 + (len(positions) - 1)


def mean(positions: Array) -> Array:
    """1 / T for each row: [T] -> float32 [T]."""
    return (positions * 0 + 1).astype(np.float32) / np.float32(len(positions))


def slopes(positions: Array, *, heads: int) -> Array:
    """How fast each head of lightning attention forgets: [T] -> float32 [heads]. `checkpoints.rules.slopes`."""
    return module_of(positions).asarray(rules.slopes(heads))


def decay(positions: Array, *, heads: int, of: str) -> Array:
    """Minus the slopes times a distance in the pass: [T] -> float32 [T, heads] or [heads, T, T]. `checkpoints.rules.decay`."""
    return module_of(positions).asarray(rules.decay(len(positions), heads=heads, of=of))


StepParts = tuple[Callable[..., Array], tuple[Read, ...], tuple[Size, ...]]

_STEPS: dict[str, Callable[["GraphLifter", Any], StepParts]] = {
    "positions": lambda lifter, parameters: (
        sections,
        (POSITIONS,),
        (Size(*(int(parameters["sections"]) * n for n in lifter.t)),),
    ),
    "temperature": lambda lifter, _parameters: (temperature, (POSITIONS,), (lifter.t,)),
    "mask": lambda lifter, _parameters: (mask, (POSITIONS, lifter.keys), (lifter.t, lifter.s)),
    "buckets": lambda lifter, _parameters: (buckets, (POSITIONS, lifter.keys), (lifter.t, lifter.s)),
    "sees_encoded": lambda lifter, _parameters: (sees_encoded, (POSITIONS, ENCODED), (lifter.t, Size(0, encoded=1))),
    "hadamard": lambda _lifter, parameters: (rotation, (POSITIONS,), (Size(parameters["size"]),) * 2),
    "last": lambda _lifter, _parameters: (last, (POSITIONS,), (Size(1),)),
    "mean": lambda lifter, _parameters: (mean, (POSITIONS,), (lifter.t,)),
    "slopes": lambda _lifter, parameters: (slopes, (POSITIONS,), (Size(parameters["heads"]),)),
    "decay": lambda lifter, parameters: (
        decay,
        (POSITIONS,),
        (Size(parameters["heads"]), lifter.t, lifter.t)
        if parameters["of"] == "pair"
        else (lifter.t, Size(parameters["heads"])),
    ),
    "zero": lambda _lifter, _parameters: (zeros, (POSITIONS,), (Size(1),)),
}
