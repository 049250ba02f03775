"""The definition of a fault, and functions with which its changes inspect a step."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from checkpoints.points import parse

from .. import ops
from ..graph import Read, Step, Weight, weight_name
from ..inapplicable import NotApplicable
from ..lift.inputs import buckets
from ..lift.node import GgmlOperation

COPY = "~"  # ends the names of steps that compute a layer a second time
SEEN = "seen:"  # starts the name of what a dump shows for a point, where that is not what the engine computed
AT = "at"  # the parameter that selects some of a fault's kinds of step

_OF_LAYER = re.compile(r"(?:^|\.)blk\.(\d+)\.")
_parse = lru_cache(maxsize=1 << 14)(parse)

Steps = Mapping[str, Step]
Parameters = Mapping[str, Any]
Change = Callable[[Step, Steps, Parameters], "Step | Sequence[Step]"]
Record = Callable[[str, Steps, Parameters], "Step | None"]
Values = tuple[Any, ...]


class Fault(Struct, frozen=True, kw_only=True):
    """One way in which an engine can be wrong.

    Attributes:
        kinds: the kinds of step that it changes ("q_rope" in every layer, "output_norm" once), or ggml's operations ("SSM_SCAN"),
            whatever a model calls their values.
        change: makes the changed step, or several in its place, from the right one, all steps by name, and the parameters.
        what: what is wrong, in a sentence; `{name}` stands for a parameter's value.
        symptom, fix, seen: sentences for the user: what it looks like, how to fix it, where it was seen.
        parameters: the values that are tried, by name; `at` lists subsets of `kinds`. A function computes the values from
            the steps.
        says: wording for parameter values that would be hard to read in `what`.
        shows: for a fault of the capture: the step that makes what the dump shows for a point, None where the dump is right.
        whole: later positions affect earlier ones, so that a run over the first positions does not show the fault.
        once: the fault concerns one place of the model or all of it, not single layers.
        near_one: it multiplies by a number near one, as an arithmetic that cuts digits off does: it is not looked for in noise.
    """

    name: str
    kinds: tuple[str, ...]
    change: Change
    what: str
    symptom: str
    fix: str
    seen: str
    parameters: Mapping[str, Values | Callable[[Steps], Values]] = field(default_factory=dict)
    group: str = ""
    says: Mapping[Any, str] = field(default_factory=dict)
    shows: Record | None = None
    whole: bool = False
    once: bool = False
    near_one: bool = False

    def variants(self, right: Steps) -> list[dict[str, Any]]:
        """Every combination of the parameters' values; empty if a parameter has no values for this model."""
        values = [value(right) if callable(value) else value for value in self.parameters.values()]
        return [dict(zip(self.parameters, chosen, strict=True)) for chosen in product(*values)]

    def sentence(self, parameters: Parameters) -> str:
        """What is wrong, with the parameters' values."""
        return self.what.format(
            **{name: self.says[value] if value in self.says else _text(value) for name, value in parameters.items()}
        )


def unchanged(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    """The change of a fault that lies only in the capture."""
    return step


def with_parameters(step: Step, **parameters: Any) -> Step:
    """The step with some parameters of its operation changed."""
    return replace(step, params={**step.params, **parameters})


def read_of(step: Step, number: int) -> Read:
    """A read of a step, by its number. Raises NotApplicable if the step has fewer reads."""
    if number >= len(step.reads):
        raise NotApplicable(f"{step.makes} reads only {len(step.reads)} values")
    return step.reads[number]


def weight_of(step: Step, number: int) -> Weight:
    """A weight of a step, by its number; None if it has fewer, as where the model lacks an optional one."""
    return step.weights[number] if number < len(step.weights) else None


def parameter_of(step: Step, name: str) -> Any:
    """A parameter of a step's operation. Raises NotApplicable if it has none of this name."""
    if name not in step.params:
        raise NotApplicable(f"{step.makes} has no parameter {name}")
    return step.params[name]


def layer_of(step: Step) -> int:
    """The layer that a step belongs to.

    Raises:
        NotApplicable: it belongs to none.
    """
    layer = _parse(step.makes).layer
    if layer is None:
        raise NotApplicable(f"{step.makes} is outside the layers")
    return layer


_OPERATIONS: Mapping[Callable[..., Any], str] = {  # ggml's names of the operations of `engine.ops`
    ops.linear: "MUL_MAT",
    ops.rms_norm: "RMS_NORM",
    ops.layer_norm: "NORM",
    ops.causal_soft_max: "SOFT_MAX",
    ops.swiglu: "GLU",
    ops.add: "SUM",  # ggml's ADD is a bias's, where it is a step of its own
    buckets: "BUCKETS",  # of relative positions: no operation of ggml's, which takes them as an input
}


def kinds_of(step: Step) -> tuple[str, ...]:
    """The names by which a fault's `kinds` may mean a step: its kind in its layer, and its operation in ggml."""
    kind = _parse(step.makes).kind.rstrip(COPY)
    operation = step.op.name if isinstance(step.op, GgmlOperation) else _OPERATIONS.get(step.op)
    return (kind,) if operation is None else (kind, operation)


def layer_near(step: Step) -> int | None:
    """The layer that a step belongs to: by its own name or, if that names no layer, the last layer that it reads from, or its weights'."""
    layer = _parse(step.makes).layer
    if layer is not None or not step.inner:
        return layer
    near = [of for name in step.names if (of := _parse(name).layer) is not None]
    return max(
        near or [int(match[1]) for weight in step.weights if (match := _OF_LAYER.search(weight_name(weight)))], default=None
    )


def kind_of(step: Step) -> str:
    """The kind of a step in its layer; a copy has the original's."""
    return _parse(step.makes).kind.rstrip(COPY)


def sibling(step: Step, right: Steps, kind: str) -> Step:
    """The step of that kind in the same layer (and the same copy of it).

    Raises:
        NotApplicable: the layer has none.
    """
    copy = COPY if step.makes.endswith(COPY) else ""
    name = f"blk.{layer_of(step)}.{kind}{copy}"
    if name not in right:
        raise NotApplicable(f"there is no {name}")
    return right[name]


def layer_input(step: Step, right: Steps) -> str:
    """The name of what the step's layer reads."""
    read = read_of(sibling(step, right, "attn_norm"), 0)
    if not isinstance(read, str):
        raise NotApplicable(f"{step.makes}: the layer's input is a history")
    return read


def subsets(*kinds: str) -> tuple[tuple[str, ...], ...]:
    """All kinds together, then each alone: the usual values of `at`."""
    return (kinds, *((kind,) for kind in kinds)) if len(kinds) > 1 else (kinds,)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
