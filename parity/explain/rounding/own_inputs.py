"""Records that pass only by raised limits, compared with what their operation makes of its own inputs, so that no earlier error counts."""

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.explain import DivergentPlace, Explanation, PossibleOperations
from engine.graph import PASSES, POSITIONS, TOKENS, History, State, Step, compute, inputs_of
from engine.inapplicable import NotApplicable
from engine.replay.disturbed import ELEMENT
from engine.replay.precision import rounded
from engine.replay.wide import is_looked_up

from ...diff.limits import EXACT_FLOOR
from ...diff.tolerances.few_numbers import share_of_few
from ...laws.beside import ROOM
from ...laws.laws import law
from ..case import Case
from ..records.beside import beside
from ..records.records import Expected, Floats
from .mixed import likeness
from .precision import KINDS

# Noise in the inputs is drawn so often; a right engine's errors, which are no random noise, make at most so many times its worst: a choice,
# ten times the amplitude.
_DRAWS, _FAR = 3, 100.0
_GIVEN = (TOKENS, POSITIONS, PASSES)  # no operation's value


def contradicted(case: Case, answer: Explanation) -> Explanation:
    """The answer that nothing differs, unless a record is not what its operation makes of its own inputs, which were recorded whole, or
    which agree with the right engine's in whole rows.

    Only records over the usual limit are checked. Operations that ggml reads from a table are left out, since another engine's own
    values differ there. If nothing states float32, a record that is off by our own rounding to a lower arithmetic counts as that
    arithmetic's.
    """
    entries = {entry.point: entry for entry in case.entries}
    lower: tuple[str, ...] = ()
    for step in case.transformer.steps:
        entry = entries.get(step.makes)
        if entry is None or is_looked_up(step) or _rounded(entry):
            continue
        usual = replace(entry, limit=np.full(len(entry.rows), EXACT_FLOOR.at(entry.point)))
        if not (usual.base > usual.limit).any():
            continue
        value = _made_of_own_inputs(case, step, entries)
        if value is None:
            allowed = _made_of_agreeing_inputs(case, step, entry, entries)
            if allowed is None:
                continue
            value, errors = case.replay.on_host[step.makes], usual.base
        else:
            errors, allowed = usual.nmse(value, case.positions), np.zeros(len(entry.rows))
        # A sum of few numbers that all but cancels is off by what float32 rounds its terms to: in proportion to the point's largest row.
        wrong = errors > np.maximum(ROOM * usual.limit / share_of_few(entry.pair.ref), allowed)
        if wrong.any():
            if not case.states_f32 and (kinds := _arithmetics(case, step, entry, entries, value)):
                lower = lower or kinds
                continue
            compared = beside(usual, errors, {step.makes: value}, case.positions)
            at = int(np.flatnonzero(wrong)[0])
            place = DivergentPlace(step.makes, int(case.positions[entry.rows[at]]), float(errors[at]), float(usual.limit[at]))
            return replace(
                answer,
                differing=int(wrong.sum()),
                first=place,
                remaining=place,
                law="" if compared is None else law(compared),
                placed=PossibleOperations((step.makes,), step.names, sure=True),
            )
    if not lower:
        return answer
    return replace(answer, precision_only=lower[0], precision_alike=lower[1:], precision_assumed=not case.states_arithmetic)


def _arithmetics(
    case: Case, step: Step, entry: Expected, entries: dict[str, Expected], value: NDArray[np.float32]
) -> tuple[str, ...]:
    """The lower arithmetics whose rounding of an operation's factors, or of its result too, makes its errors beside `value`, best first."""
    right = entry.taken(value, case.positions)
    errors, known = entry.errors_beside(value, case.positions)
    near: dict[str, float] = {}
    for kind in KINDS:
        for storage in (False, True):
            computed = _made_of_own_inputs(case, rounded([step], kind, storage=storage)[0], entries)
            if computed is not None:
                rounding = np.where(known, entry.taken(computed, case.positions) - right, 0.0)
                if (alike := likeness(errors, rounding)) > near.get(kind, 0.0):
                    near[kind] = alike
    return tuple(sorted(near, key=lambda kind: -near[kind]))


def _made_of_agreeing_inputs(case: Case, step: Step, entry: Expected, entries: dict[str, Expected]) -> Floats | None:
    """How far an operation's records may be from the right ones, NMSE [R], where all that it reads agrees with the right engine in whole
    rows at every position, by float32's usual limit: by what errors of that size make of it. None where it does not agree.
    """
    if not step.names or any(isinstance(read, History | State) for read in step.reads):
        return None
    inputs: dict[str, NDArray[np.float32]] = {}
    for name in step.names:
        if name in _GIVEN:
            inputs[name] = case.replay.on_host[name]
            continue
        read = entries.get(name)
        if read is None or not read.whole_rows or not np.array_equal(read.rows, np.arange(len(case.positions))):
            return None
        if read.base.max() > EXACT_FLOOR.operations or _rounded(read):
            return None
        inputs[name] = case.replay.on_host[name]
    draw, backend, weights = np.random.default_rng(1), case.transformer.backend, case.replay.weights
    worst = np.zeros(len(entry.rows))
    for _ in range(_DRAWS):
        noisy = {
            name: value if name in _GIVEN else _disturbed(value, float(entries[name].base.max()), draw)
            for name, value in inputs.items()
        }
        try:
            made = compute(step, inputs_of(step, lambda name, noisy=noisy: backend.array(noisy[name]), weights), weights)  # type: ignore[misc]
        except (NotApplicable, ValueError):
            return None
        worst = np.maximum(worst, entry.between(backend.to_host(made), case.replay.on_host[step.makes], case.positions))
    return _FAR * worst


def _disturbed(value: NDArray[np.float32], error: float, draw: np.random.Generator) -> NDArray[np.float32]:
    """A value with noise of this NMSE, or at least of float32's rounding, in all elements; ids, which are whole numbers, stay."""
    if bool((value == np.rint(value)).all()):
        return value
    size = np.sqrt(max(error, ELEMENT**2) * np.mean(np.square(value, dtype=np.float64), axis=-1, keepdims=True))
    noisy: NDArray[np.float32] = (value + size * draw.standard_normal(value.shape)).astype(np.float32)
    return noisy


def _made_of_own_inputs(case: Case, step: Step, entries: dict[str, Expected]) -> NDArray[np.float32] | None:
    """What an operation makes of the inputs that a dump holds; None where one of them was not recorded whole and unrounded."""
    if not step.names or any(isinstance(read, History) for read in step.reads):
        return None
    whole = {name: unrounded(case, entries.get(name)) for name in step.names}
    inputs = {name: value for name, value in whole.items() if value is not None}
    if len(inputs) < len(whole):
        return None
    weights, backend = case.replay.weights, case.transformer.backend
    try:
        return backend.to_host(compute(step, inputs_of(step, lambda name: backend.array(inputs[name]), weights), weights))
    except (NotApplicable, ValueError):
        return None


def unrounded(case: Case, entry: Expected | None) -> NDArray[np.float32] | None:
    """A point's rows, as `whole` gives them, unless all of them may have been rounded by the recorder."""
    return None if entry is None or _rounded(entry) else whole(case, entry)


def whole(case: Case, entry: Expected | None) -> NDArray[np.float32] | None:
    """A point's rows at all positions, if each was recorded whole, with all digits, and has no element that is not finite."""
    if entry is None or entry.quantum.any() or entry.index is not None:
        return None
    right = case.replay.on_host[entry.point]
    rows = len(case.positions)
    if right.ndim != 2 or entry.values.shape != right.shape or not np.array_equal(entry.rows, np.arange(rows)):
        return None
    if not entry.present.all() or not np.isfinite(entry.values).all():
        return None
    return entry.values.astype(np.float32)


def _rounded(entry: Expected) -> bool:
    """Whether all values have ten bits of mantissa or fewer: a recorder that keeps F16 or BF16 rounds what the operation did not."""
    return not (entry.values[entry.present].astype(np.float32).view(np.uint32) & np.uint32(0x1FFF)).any()
