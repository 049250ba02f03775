"""In which order and in which layers faults are tried: in all, from one on, up to one, or in every second one."""

from collections.abc import Iterator
from dataclasses import replace

from .batch import screened
from .screening import Screening
from .state import Candidate, Layers, State

STAGES = 3  # in all layers


def stages(screening: Screening, state: State, layers: Layers) -> Iterator[list[Candidate]]:
    """The candidates in these layers (None: all) by what is the least to compute.

    In all layers first those that change nothing in front of the last point that agrees. Then, where a point behind the first
    place agrees, those that only show something else: what was computed wrong would be wrong there too. The others last.
    """
    left = list(screening.candidates(state, layers))
    first = state.first
    if first is not None:
        behind = zip(screening.entries[first.point + 1 :], state.nmse[first.point + 1 :], strict=True)
        shown = any(bool((errors <= entry.limit).all()) for entry, errors in behind)
        agreed = screening.entries[first.point - 1].point if layers is None and first.point else None
        late = [
            agreed is not None and state.planting.begin(one.fault, None, one.parameters) > state.order[agreed] for one in left
        ]
        capture = [shown and one.fault.shows is not None for one in left]
        yield [one for one, now in zip(left, late, strict=True) if now]
        yield [one for one, before, now in zip(left, late, capture, strict=True) if now and not before]
        left = [one for one, *before in zip(left, late, capture, strict=True) if not any(before)]
    yield left


def rescoped(screening: Screening, state: State, explaining: State) -> Iterator[State]:
    """The fault that leads from a state to `explaining`, in other layers that get further than `explaining` does.

    If it was found in one layer, in all from there on and in every second one; and each of these, and a fault that was found
    in all layers, up to a layer in front of the place that it does not explain.
    """
    last = explaining.faults[-1]
    if explaining.first is None or last.fault.once or len(explaining.faults) != len(state.faults) + 1:
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


def ranges(screening: Screening, state: State) -> Iterator[State]:
    """States that get further by one fault that begins in a layer in front of the first place: in all from there on, or in
    every second one. The search ends with the layers in which something explains all: what is alike there is found too.
    """
    suspects = screening.suspects(state)
    for begin, step in [*((layer, 1) for layer in reversed(suspects[:-1])), *((layer, 2) for layer in suspects[:2])]:
        layers = tuple(range(begin, screening.n_layers, step))
        whole = False
        for candidate, (place, _) in screened(screening, state, layers, list(screening.candidates(state, layers))):
            checked = screening.check(state, candidate) if place is None or (state.first and state.first < place) else None
            if checked is not None and further(state, checked):
                states = [checked, *rescoped(screening, state, checked)]
                whole = whole or any(one.first is None for one in states)
                yield from states
        if whole or screening.budget.over():
            return


def further(than: State, state: State) -> bool:
    """Whether a state's first place lies beyond another's, or it has none."""
    return than.first is not None and (state.first is None or than.first < state.first)
