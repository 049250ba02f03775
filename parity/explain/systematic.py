"""Errors of the size of lower arithmetic that follow one number of the model: rounding is scattered, a factor, an epsilon or a base is not.

To first order a small wrong number moves every recorded value along the derivative of that value by the number. Rounding has no
preferred direction: in many values its error along any given one is next to nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.points import parse
from engine.backend import Array
from engine.graph import Step
from engine.inapplicable import NotApplicable

from .budget import Budget
from .case import Case
from .one_element import one_element
from .records import Expected, Floats

_CHANGE = 2.0**-10  # of a number, as a part of it; float32's rounding is then a part in 10,000 of what it moves
_OF_EPSILON = 31.0  # the same for an epsilon: a small part of it moves nothing
# The share of the errors' energy along one derivative: float32 engines with a number off by 1e-4 to 5e-3 reach 0.999, and what is beyond
# first order takes 2 % away from only the largest. In twelve values of equal weight normal noise exceeds it once in 10^9 draws.
_ALONG = 0.98
_WEIGHT = 12.0
SECONDS = (
    30.0  # to try all numbers: some 40 runs up to the point, 9 s for the logits of a model of 24 layers and 50 million weights
)
_LAYERS = 2  # layers before the first difference up to which each is tried by itself, as well as all together


class _Moved(Struct, frozen=True):
    """An operation whose result is changed a little."""

    op: Callable[..., Array]
    shifted: bool

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        value = self.op(*inputs, **params)
        if value.dtype.kind != "f":
            return value
        change = value.dtype.type(_CHANGE)
        return value + change if self.shifted else value * (1 + change)


def systematic(case: Case, entry: Expected, errors: Floats, known: NDArray[np.bool_], seconds: float = SECONDS) -> str | None:
    """What the errors of a point follow, as words: "blk.*.ffn_out were multiplied by 1.0013", "element 5 of blk.0.v were off".

    Empty if nothing; None if they follow nothing that was tried before the time was up.

    Args:
        errors: [R, k], the recorded elements minus the right ones, where they are known: bool [R, k].
        seconds: after which no further number is tried.
    """
    energy = np.sqrt(entry.energy)[:, None]
    known = known & entry.present & (energy > 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wanted = np.where(known, errors / energy, 0.0)
    total = float((wanted * wanted).sum())
    if not (np.isfinite(total) and total > 0):
        return ""
    if alone := one_element(case, entry, errors, known):
        return alone
    steps = _until(case.transformer.steps, entry.point)
    positions = case.positions
    right = entry.taken(case.replay.on_host[entry.point], positions)
    best, words, budget = _ALONG, "", Budget(seconds)
    for what, change, changed in _changes(steps):
        if budget.over():
            return words or None
        try:
            tensor = case.make(changed, len(positions)).on_host[entry.point]
        except (NotApplicable, KeyError):
            continue
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            moved = np.where(known, (entry.taken(tensor, positions) - right) / energy, 0.0)
        size = float((moved * moved).sum())
        if not (np.isfinite(size) and size > 0) or size**2 / float((moved**4).sum()) < _WEIGHT:
            continue
        along = float((moved * wanted).sum())
        if along**2 / (size * total) > best:
            moved_by = along / size * change
            best, words = along**2 / (size * total), what.format(factor=_factor(moved_by), summand=moved_by)
    return words


def _factor(change: float) -> str:
    """1 + the change, to two digits of the change, which is as much as a derivative knows."""
    return f"{1 + change:.{max(0, 1 - int(np.floor(np.log10(abs(change)))))}f}"


def _until(steps: Sequence[Step], point: str) -> list[Step]:
    end = next(number for number, step in enumerate(steps) if step.makes == point)
    return list(steps[: end + 1])


def _changes(steps: Sequence[Step]) -> Iterator[tuple[str, float, list[Step]]]:
    """Models in which one number is changed, each with its words, which take the change that fits, and by how much it is changed."""
    layers = sorted({layer for step in steps if (layer := parse(step.makes).layer) is not None})
    scopes: list[int | None] = [None, *(layers if 1 < len(layers) <= _LAYERS else ())]
    for scope in scopes:
        in_scope = [step for step in steps if scope is None or parse(step.makes).layer == scope]
        for kind in dict.fromkeys(parse(step.makes).kind for step in in_scope):
            chosen = {step.makes for step in in_scope if parse(step.makes).kind == kind}
            name = next(iter(chosen)) if len(chosen) == 1 else f"blk.*.{kind}"
            yield (
                name + " were multiplied by {factor}",
                _CHANGE,
                [replace(step, op=_Moved(step.op, False)) if step.makes in chosen else step for step in steps],
            )
            yield (
                "{summand:.1e} were added to " + name,
                _CHANGE,
                [replace(step, op=_Moved(step.op, True)) if step.makes in chosen else step for step in steps],
            )
        for name in dict.fromkeys(name for step in in_scope for name, value in step.params.items() if isinstance(value, float)):
            change = _OF_EPSILON if name.startswith("eps") else _CHANGE
            changed = [_with(step, name, 1 + change) if scope in (None, parse(step.makes).layer) else step for step in steps]
            yield f"{name} were multiplied by {{factor}}", change, changed


def _with(step: Step, name: str, factor: float) -> Step:
    value = step.params.get(name)
    return replace(step, params={**step.params, name: value * factor}) if isinstance(value, float) else step
