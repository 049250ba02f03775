"""A fault of models with an attention window in some layers: another pattern of these layers, each with everything that belongs to its
kind."""

from msgspec.structs import replace

from ..graph import Step
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, Values, kind_of, layer_of
from .index import once
from .windows import has_window

_OF_KIND = ("q_rope", "k_rope", "kq_soft_max")  # what differs between layers with a window and those without
_MOST = 8  # patterns of models: every second to every eighth layer is without a window
_PLACES = {"first": 0, "last": -1}


@once
def _windowed(right: Steps) -> dict[int, bool]:
    """For each layer with attention, whether it has a window; empty unless there are layers of both kinds."""
    of = {layer_of(step): has_window(step) for step in right.values() if step.makes.endswith(".kq_soft_max")}
    return of if len(set(of.values())) == 2 else {}


def _patterns(right: Steps) -> Values:
    """(n, place): of every n layers the one at this place has no window. Patterns that give this model's own layers are left out."""
    own = _windowed(right)
    every = tuple((n, place) for n in range(2, _MOST + 1) for place in ("last", "first"))
    return tuple(of for of in every if any(_wants_window(layer, of) is not has for layer, has in own.items())) or every[:1]


def _wants_window(layer: int, pattern: tuple[int, str]) -> bool:
    n, place = pattern
    return layer % n != _PLACES[place] % n


def _by_pattern(step: Step, right: Steps, parameters: Parameters) -> Step:
    layer, windowed = layer_of(step), _windowed(right)
    wanted = _wants_window(layer, parameters["pattern"])
    if windowed.get(layer, wanted) is wanted:
        return step
    others = (right.get(f"blk.{other}.{kind_of(step)}") for other, has in windowed.items() if has is wanted)
    like = next((other for other in others if other is not None), None)
    if like is None or like.op != step.op or any(like.params.get(size) != step.params.get(size) for size in ("heads", "dims")):
        raise NotApplicable(f"{step.makes}: layers of the other kind have other shapes")
    return replace(step, params=like.params, weights=step.weights if any(step.weights) else like.weights)


FAULTS = (
    Fault(
        name="window-pattern",
        kinds=_OF_KIND,
        change=_by_pattern,
        what="other layers have the window, and the RoPE that goes with it: of every {pattern} is without",
        symptom="right up to the first layer of the wrong kind; there position 0 is right",
        fix="read <architecture>.attention.sliding_window_pattern, or use the pattern of the model's family: compare `parity model`",
        seen="Gemma 2's pattern (every second layer) in Gemma 3 (every sixth)",
        parameters={"pattern": _patterns},
        says={(n, place): f"{n} layers the {place}" for n in range(2, _MOST + 1) for place in _PLACES},
        once=True,
    ),
)
