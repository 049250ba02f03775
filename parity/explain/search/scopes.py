"""The order in which faults are tried, and in which layers: all, from one on, up to one, every second one, or all with a window alike."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from msgspec.structs import replace

from checkpoints.points import in_layer
from engine.faults import AT
from engine.faults.base import layer_near

from .screening import Screening
from .state import WEIGHTS, Candidate, Layers, SearchState
from .sweep import screened

_MANY = 32  # variants of one fault in a layer: part-missing alone has 96 of 280
STAGES = 3  # stages of candidates in all layers
# The steps whose parameters differ between layers of one model: attention with a window or without, each with its own RoPE.
_OF_PATTERN = ("q_rope", "kq_soft_max")
# Error at the first place from which on whole layers may have the weights of others, which is tried first. A choice: it decides the order
# alone. Ten or more of 24 layers with an earlier layer's weights made 0.47 to 2.3 in nine models and 0.09 in granite; of 27 faults in one
# layer drawn in the same models one made more than 0.13.
_LARGE = 0.3


def stages(screening: Screening, state: SearchState, layers: Layers) -> Iterator[list[Candidate]]:
    """The candidates in these layers (None: all), those that take the least computing first.

    In all layers, candidates that change nothing before the last point that agrees come first. Those of `long` do only where they concern
    whole layers, the first layers agree and the error is large. Then, if a point after the first place agrees, those of the capture: a
    wrong computation would have made that point wrong, too. The others come last.
    """
    left = list(screening.candidates(state, layers))
    first, many = state.first, long(left)
    inside = layers is None and next(iter(screening.suspects(state)), 0) > 0
    soon = widest(left, many) if inside and _error(screening, state) > _LARGE else {}
    if first is not None:
        later = zip(screening.entries[first.point + 1 :], state.nmse[first.point + 1 :], strict=True)
        shown = any(bool((errors <= entry.limit).all()) for entry, errors in later)
        agreed = last_agreed(screening, state) if layers is None else None
        late = [
            agreed is not None
            and (candidate.fault.name not in many or candidate.parameters.get(AT) == soon.get(candidate.fault.name, ()))
            and acts_after(state, candidate, agreed)
            for candidate in left
        ]
        capture = [shown and candidate.fault.shows is not None for candidate in left]
        yield [candidate for candidate, now in zip(left, late, strict=True) if now]
        yield [candidate for candidate, before, now in zip(left, late, capture, strict=True) if now and not before]
        left = [candidate for candidate, *before in zip(left, late, capture, strict=True) if not any(before)]
    yield left


def long(candidates: Sequence[Candidate]) -> frozenset[str]:
    """The faults that rebuild matrices in so many ways that they would delay all others."""
    variants = Counter(candidate.fault.name for candidate in candidates if candidate.fault.group in WEIGHTS)
    return frozenset(name for name, count in variants.items() if count >= _MANY)


def widest(candidates: Sequence[Candidate], names: Collection[str]) -> dict[str, object]:
    """The place (`at`) that is listed first, whole layers for faults of layers, of each of these faults by name."""
    return {one.fault.name: one.parameters.get(AT) for one in reversed(candidates) if one.fault.name in names}


def _error(screening: Screening, state: SearchState) -> float:
    """The error at a state's first place, 0 without one."""
    if state.first is None:
        return 0.0
    here = screening.entries[state.first.point].rows == state.first.row
    return float(state.nmse[state.first.point][here].max())


def last_agreed(screening: Screening, state: SearchState) -> int | None:
    """The number of the step that makes the last point before the first place; None if there is none."""
    return (
        state.order[screening.entries[state.first.point - 1].point] if state.first is not None and state.first.point else None
    )


def acts_after(state: SearchState, candidate: Candidate, number: int) -> bool:
    """Whether a candidate in all layers changes no step up to that number."""
    begins = state.planting.begin(candidate.fault, None, candidate.parameters) <= number
    return not begins or not state.planting.changes_by(candidate.fault, candidate.parameters, number)


def acts_between(screening: Screening, state: SearchState, candidate: Candidate, number: int) -> bool:
    """Whether a candidate in all layers that `acts_after` a step changes one from there to the first place: most variants of a catalogue
    change nothing in a model that lacks what they are about."""
    point = None if state.first is None else screening.entries[state.first.point].point
    if point is None or point in state.shown or candidate.fault.shows is not None:  # what a dump shows may be made later
        return True
    place = state.order[point]
    return state.planting.changes_by(candidate.fault, candidate.parameters, place, number)


def rescoped(screening: Screening, state: SearchState, explaining: SearchState) -> Iterator[SearchState]:
    """The fault that leads from a state to `explaining`, in other layers, if that gets further than `explaining`.

    First it is tried in all layers with the same attention: those with a window of a model that has others, say. A fault that was found
    in one layer is tried in all from there on and in every second one; each of these, and a fault that was found in all layers, is also
    tried up to a layer before the place that it does not explain.
    """
    last = explaining.faults[-1]
    if explaining.first is None or last.fault.once or len(explaining.faults) != len(state.faults) + 1:
        return
    for alike in _of_one_pattern(screening, state):
        if last.layers is None or not set(alike).isdisjoint(last.layers):
            whole = screening.check(state, replace(last, layers=alike))
            if whole is not None and further(explaining, whole):
                yield whole
                if whole.first is None:
                    return
    begin = 0 if last.layers is None else last.layers[0]
    for step in (1, 2):
        layers = tuple(range(begin, screening.n_layers, step))
        everywhere = len(layers) == screening.n_layers
        whole = explaining if everywhere else screening.check(state, replace(last, layers=layers))
        if whole is None or (everywhere and last.layers is not None):  # a fault in all layers was tried before
            continue
        if further(explaining, whole):
            yield whole
        for end in screening.suspects(whole):
            cut = replace(last, layers=tuple(layer for layer in layers if layer < end))
            shorter = screening.check(state, cut) if cut.layers and cut.layers != layers else None
            if shorter is not None and further(whole, shorter) and further(explaining, shorter):
                yield shorter


def where_it_holds(screening: Screening, state: SearchState, explaining: SearchState) -> SearchState:
    """The state `explaining`, whose last fault is in all layers, with that fault in those before the one that contradicts it.

    A fault that leaves the very operation wrong that it changes, where all that goes into it agrees, is not in that layer; what comes
    after may have any cause. The same state where nothing contradicts it so, or fewer layers explain less.
    """
    last = explaining.faults[-1]
    if explaining.first is None or last.layers is not None or last.fault.once or last.fault.shows is not None:
        return explaining
    cone = screening.cone(explaining)
    if not cone.sure or not cone.layers or cone.kinds.isdisjoint(last.parameters.get(AT, last.fault.kinds)):
        return explaining
    changed = {layer_near(state.steps[number]) for number in state.planting.edits(last.fault, None, last.parameters)}
    before = tuple(sorted(layer for layer in changed if layer is not None and layer < cone.layers[0]))
    cut = screening.check(state, replace(last, layers=before)) if before else None
    return explaining if cut is None or further(cut, explaining) else cut


def as_far_as_shown(screening: Screening, best: SearchState) -> SearchState:
    """The best state of a search that leaves something unexplained, with faults in all layers in those before that place alone, if they
    explain as much: what comes after them may be right in the other layers.
    """
    layers = tuple(range(screening.suspects(best)[0])) if best.first is not None and screening.suspects(best) else ()
    for number, candidate in enumerate(best.faults if layers else ()):
        if candidate.layers is not None or candidate.fault.once or candidate.fault.shows is not None:
            continue
        state: SearchState | None = screening.start()
        for other in (*best.faults[:number], replace(candidate, layers=layers), *best.faults[number + 1 :]):
            state = screening.check(state, other) if state is not None else None
        if state is not None and not further(state, best):
            best = state
    return best


def _of_one_pattern(screening: Screening, state: SearchState) -> list[tuple[int, ...]]:
    """The layers whose attention has the same parameters, of a model in which it differs between layers: each set of two or more."""
    patterns: dict[str, list[int]] = {}
    for layer in range(screening.n_layers):
        steps = (state.planting.right.get(in_layer(layer, kind)) for kind in _OF_PATTERN)
        patterns.setdefault(repr([step.params for step in steps if step is not None]), []).append(layer)
    return [tuple(layers) for layers in patterns.values() if len(layers) > 1] if len(patterns) > 1 else []


def ranges(screening: Screening, state: SearchState) -> Iterator[SearchState]:
    """States that get further by one fault that begins in a layer before the first place, in all layers from there on or in
    every second one. The search ends with the layers in which something explains everything; similar faults there are found, too.
    """
    suspects = screening.suspects(state)
    for begin, step in [*((layer, 1) for layer in reversed(suspects[:-1])), *((layer, 2) for layer in suspects[:2])]:
        layers = tuple(range(begin, screening.n_layers, step))
        whole = False
        for candidate, (place, _) in screened(screening, state, layers, list(screening.candidates(state, layers))):
            checked = screening.check(state, candidate) if place is None or (state.first and state.first < place) else None
            if checked is not None and further(state, checked):
                states = [checked, *rescoped(screening, state, checked)]
                whole = whole or any(tried.first is None for tried in states)
                yield from states
        if whole or screening.budget.over():
            return


def further(than: SearchState, state: SearchState) -> bool:
    """Whether a state's first place lies beyond another's, or there is none."""
    return than.first is not None and (state.first is None or than.first < state.first)
