"""Errors of the size of lower arithmetic that follow one number of the model: rounding is scattered, a factor, an epsilon or a base is not.

To first order a small wrong number moves every recorded value along the derivative of that value by the number. Rounding has no
preferred direction: in many values its error along any given one is next to nothing.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.points import parse
from engine.backend import Array
from engine.faults.edits import ggml, number
from engine.graph import Step
from engine.inapplicable import NotApplicable

from ..budget import Budget
from ..case import Case
from ..records.records import Expected, Floats
from .first_rows import may_follow
from .one_element import one_element

_CHANGE = 2.0**-10  # of a number, as a part of it; float32's rounding is then a part in 10,000 of what it moves
_OF_EPSILON = 31.0  # the same for an epsilon: a small part of it moves nothing
# The share of the errors' energy along one derivative: float32 engines with a number off by 1e-4 to 5e-3 reach 0.999, and what is beyond
# first order takes 2 % away from only the largest. In twelve values of equal weight normal noise exceeds it once in 10^9 draws.
_ALONG = 0.98
_WEIGHT = 12.0
SECONDS = (
    30.0  # to try all numbers: some 40 runs up to the point, 9 s for the logits of a model of 24 layers and 50 million weights
)
# Layers before the first difference up to which each is tried by itself, as well as all together; where the steps in question are known.
_LAYERS, IN_QUESTION = 2, 4


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


class Followed(Struct, frozen=True):
    """A number that the errors of a point follow.

    `kind` are the results that it multiplies, or is added to if it is `shifted`; "" for a parameter of the model. `change` is what fits,
    to first order: the factor less one, or the summand. `along` is the share of the errors' energy that it explains.
    """

    words: str
    kind: str
    shifted: bool
    change: float
    along: float


def systematic(case: Case, entry: Expected, errors: Floats, known: NDArray[np.bool_], seconds: float = SECONDS) -> str | None:
    """What the errors of a point follow, as words: "blk.*.ffn_out were multiplied by 1.0013", "element 5 of blk.0.v were off".

    Empty if they follow nothing; None if they follow nothing that was tried before the time was up.

    Args:
        errors: [R, k], the recorded elements minus the right ones, where they are known: bool [R, k].
        seconds: after which no further number is tried.
    """
    known = known & entry.present & (entry.energy > 0)[:, None]
    if not np.where(known, errors, 0.0).any():
        return ""
    if alone := one_element(case, entry, errors, known):
        return alone
    numbers, complete = followed(case, entry, errors, known, Budget(seconds))
    best = max(numbers, key=lambda number: number.along, default=None)
    if best is None:
        return "" if complete else None
    return best.words


def followed(
    case: Case,
    entry: Expected,
    errors: Floats,
    known: NDArray[np.bool_],
    budget: Budget,
    among: Collection[str] | None = None,
) -> tuple[list[Followed], bool]:
    """The numbers that the errors of a point follow, each by itself, and whether all were tried in time; arguments as in `systematic`.

    Args:
        among: the steps that may be changed; None for all.
    """
    energy = np.sqrt(entry.energy)[:, None]
    known = known & entry.present & (energy > 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wanted = np.where(known, errors / energy, 0.0)
    total = float((wanted * wanted).sum())
    if not (np.isfinite(total) and total > 0):
        return [], True
    steps = _until(case.transformer.steps, entry.point)
    positions = case.positions
    right = entry.taken(case.replay.on_host[entry.point], positions)
    found: list[Followed] = []
    changes = list(_changes(steps, among))
    may = may_follow(case, entry, wanted, known, [changed for _, changed in changes], budget, 1 - _ALONG)
    for candidate, changed in (change for change, worth in zip(changes, may, strict=True) if worth):
        if budget.over():
            return found, False
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
        if along**2 / (size * total) > _ALONG:
            moved_by = along / size * candidate.change
            words = candidate.words.format(factor=_factor(moved_by), summand=moved_by)
            found.append(replace(candidate, words=words, change=moved_by, along=along**2 / (size * total)))
    return found, True


def _factor(change: float) -> str:
    """1 + the change, to two digits of the change, which is as much as a derivative knows."""
    return f"{1 + change:.{max(0, 1 - int(np.floor(np.log10(abs(change)))))}f}"


def _until(steps: Sequence[Step], point: str) -> list[Step]:
    end = next(number for number, step in enumerate(steps) if step.makes == point)
    return list(steps[: end + 1])


def _changes(steps: Sequence[Step], among: Collection[str] | None) -> Iterator[tuple[Followed, list[Step]]]:
    """Models in which one number is changed, each with its words, which take the change that fits, and by how much it is changed."""
    allowed = [step for step in steps if among is None or step.makes in among]
    layers = sorted({layer for step in allowed if (layer := parse(step.makes).layer) is not None})
    scopes: list[int | None] = [None, *(layers if 1 < len(layers) <= (_LAYERS if among is None else IN_QUESTION) else ())]
    for scope in scopes:
        in_scope = [step for step in allowed if scope is None or parse(step.makes).layer == scope]
        for kind in dict.fromkeys(parse(step.makes).kind for step in in_scope):
            chosen = {step.makes for step in in_scope if parse(step.makes).kind == kind}
            name = next(iter(chosen)) if len(chosen) == 1 else f"blk.*.{kind}"
            for shifted, words in (
                (False, name + " were multiplied by {factor}"),
                (True, "{summand:.1e} were added to " + name),
            ):
                changed = [replace(step, op=_Moved(step.op, shifted)) if step.makes in chosen else step for step in steps]
                yield Followed(words, kind, shifted, _CHANGE, 0.0), changed
        for scaled in _scaled_alike(in_scope):
            changed = [replace(step, op=_Moved(step.op, False)) if step.makes in scaled else step for step in steps]
            kinds = dict.fromkeys(parse(name).kind for name in sorted(scaled))
            yield Followed(f"{' and '.join(kinds)} were multiplied by {{factor}}", "", False, _CHANGE, 0.0), changed
        for name in dict.fromkeys(name for step in in_scope for name, value in step.params.items() if isinstance(value, float)):
            change = _OF_EPSILON if name.startswith("eps") else _CHANGE
            makes = {step.makes for step in in_scope}
            changed = [_with(step, name, 1 + change) if step.makes in makes else step for step in steps]
            yield Followed(f"{name} were multiplied by {{factor}}", "", False, change, 0.0), changed


def _scaled_alike(steps: Sequence[Step]) -> list[set[str]]:
    """The results of several kinds that one number multiplies: it is one of the model's, such as Granite's factor of both branches."""
    factors: dict[float, set[str]] = {}
    for step in steps:
        if ggml(step, "SCALE"):
            factors.setdefault(number(step, 0), set()).add(step.makes)
    return [makes for makes in factors.values() if len({parse(name).kind for name in makes}) > 1]


def _with(step: Step, name: str, factor: float) -> Step:
    value = step.params.get(name)
    return replace(step, params={**step.params, name: value * factor}) if isinstance(value, float) else step
