"""One view of both kinds of rotation: the RoPE of `engine.ops`, and ggml's with its further options (YaRN, sections, an offset in the
head)."""

from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import PASSES, History, Read, Step
from ..inapplicable import NotApplicable
from ..lift.node import GgmlOperation
from .base import Steps, Values, parameter_of, with_parameters
from .edits import HandsOn, WithInput, ggml, integer, left_out, number, with_values
from .index import once

_FLOATS = {"base": 5, "scale": 6}  # of op_params, as ggml_rope_impl writes them
_DIMS, _MODE, BEGIN = 1, 2, 15  # the last: the first rotated element of a head
_MODES = {"norm": 0, "neox": 2}  # GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX; the modes with sections pair halves as well
_OPERANDS = 3  # what is rotated, positions, frequency factors
_QUERIES, _KEYS = ("q_rope", "q_pe"), ("k_rope", "k_pe")  # whole heads, or only the part that is rotated
ROTATED = (*_QUERIES, *_KEYS)
SECTIONS = 4  # time, height, width and a fourth that text leaves at 0


@once
def _rotated(right: Steps) -> tuple[Values, Values]:
    """The kinds of a model's rotated queries and keys: where a part is rotated by itself, that part and not the whole."""
    names = {kind: [name for name in right if name.endswith(f".{kind}")] for kind in ROTATED}
    turned = {kind for kind, of in names.items() if of and not ggml(right[of[0]], "CONCAT")} or {"q_rope", "k_rope"}
    return tuple(kind for kind in _QUERIES if kind in turned), tuple(kind for kind in _KEYS if kind in turned)


def both(right: Steps) -> Values:
    """Values of `at`: queries and keys alike."""
    queries, keys = _rotated(right)
    return ((*queries, *keys),)


def both_then_each(right: Steps) -> Values:
    """Values of `at`: queries and keys alike, then each alone."""
    queries, keys = _rotated(right)
    return tuple(kinds for kinds in ((*queries, *keys), queries, keys) if kinds)


def each_then_both(right: Steps) -> Values:
    """Values of `at`: queries alone, keys alone, both."""
    whole, *each = both_then_each(right)
    return (*each, whole)


def is_rotation(step: Step) -> bool:
    """Whether a step is a plain rotation, of `engine.ops` or of ggml."""
    return step.op is ops.rope or ggml(step, "ROPE")


def require_rotation(step: Step) -> Step:
    """The step, if it is a plain rotation.

    Raises:
        NotApplicable: it is not, or another fault has already changed it.
    """
    if not is_rotation(step):
        raise NotApplicable(f"{step.makes} is not a plain RoPE")
    return step


def rotary(step: Step, name: str) -> Any:
    """A parameter of a rotation: its base, scale, dims or pairs ("norm", "neox")."""
    if step.op is ops.rope:
        return parameter_of(step, name)
    if name == "pairs":
        return "norm" if integer(require_rotation(step), _MODE) == _MODES["norm"] else "neox"
    return integer(require_rotation(step), _DIMS) if name == "dims" else number(require_rotation(step), _FLOATS[name])


def with_rotary(step: Step, **values: Any) -> Step:
    """The rotation with other parameters."""
    if step.op is ops.rope:
        return with_parameters(step, **values)
    changes: dict[int, int | float] = {}
    for name, value in values.items():
        if name == "pairs":
            changes[_MODE] = _MODES[value]
        else:
            changes[_DIMS if name == "dims" else _FLOATS[name]] = int(value) if name == "dims" else float(value)
    return with_values(require_rotation(step), changes)


def heads_of(step: Step) -> int:
    """How many heads a rotation rotates."""
    return int(parameter_of(step, "heads") if step.op is ops.rope else require_rotation(step).params["shape"][-2].fixed)


def head_size(step: Step) -> int:
    """The size of a rotated head.

    Raises:
        NotApplicable: the size is only known in a run.
    """
    if not ggml(step, "ROPE"):
        raise NotApplicable(f"{step.makes} does not give the head size")
    return int(step.params["shape"][-1].fixed)


def of_head(step: Step, power: int) -> Step:
    """A rotation of a part of the head whose frequencies are base^(−2i / n) with n = dims · (head size / dims)^power."""
    if step.op is ops.rope:
        return replace(step, op=_OfHead(power))
    ratio = head_size(step) / int(rotary(step, "dims"))
    if ratio == 1:
        raise NotApplicable(f"{step.makes} rotates the whole head")
    return with_rotary(step, base=float(rotary(step, "base")) ** ratio**-power)


class _OfHead(Struct, frozen=True):
    """`ops.rope` with the base raised to (dims / head size)^power."""

    power: int

    def __call__(
        self, x: Array, positions: Array, factors: Array | None = None, *, heads: int, dims: int, base: float, **params: Any
    ) -> Array:
        """[T, H · d] -> [T, H · d]."""
        ratio = x.shape[1] / heads / dims
        if ratio == 1:
            raise NotApplicable("the whole head is rotated")
        return ops.rope(x, positions, factors, heads=heads, dims=dims, base=base**ratio**-self.power, **params)


def has_factors(step: Step) -> bool:
    """Whether frequency factors divide a rotation's frequencies."""
    return any(weight is not None for weight in require_rotation(step).weights)


def without_factors(step: Step) -> Step:
    """The rotation without its frequency factors."""
    if step.op is ops.rope:
        return replace(step, weights=(None,))
    operands = require_rotation(step).params["operands"]
    kept = (*operands[: _OPERANDS - 1], *((None,) if len(operands) >= _OPERANDS else ()))
    return replace(step, weights=(), params={**step.params, "operands": kept})


def not_rotated(step: Step) -> Step:
    """The step without the rotation: it passes on its input."""
    if step.op is ops.rope:
        return replace(step, op=_as_it_is)
    kept = left_out(require_rotation(step))
    return replace(kept, params={**kept.params, "operands": kept.params["operands"][:1]})


def _as_it_is(x: Array, *_inputs: Any, **_params: Any) -> Array:
    return x.copy()


def at_positions(step: Step, change: Callable[..., Array], *reads: Read) -> Step:
    """The step that rotates by changed positions; `change` is given them and the values of `reads`."""
    at = 1 if require_rotation(step).op is ops.rope else step.params["operands"][1].index
    besides = tuple(range(len(step.reads), len(step.reads) + len(reads)))
    return replace(step, op=WithInput(step.op, at, change, besides), reads=(*step.reads, *reads))


class _Twice(HandsOn, frozen=True):
    def __call__(self, x: Array, *inputs: Any, **params: Any) -> Array:
        return self.op(self.op(x, *inputs, **params).reshape(x.shape), *inputs, **params)


def twice(step: Step) -> Step:
    """The step, rotating its result once more."""
    return replace(step, op=_Twice(require_rotation(step).op))


def backwards(step: Step) -> Step:
    """The step that rotates in the other direction."""
    if step.op is ops.rope:
        return at_positions(step, lambda positions: -positions)
    return replace(require_rotation(step), op=GgmlOperation("ROPE_BACK"))


def by_pass(positions: Array, passes: Array) -> Array:
    """Positions counted from 0 in each pass: [T], or [4 · T] with sections."""
    same = passes[:, None] == passes[None, :]
    before = module_of(passes).arange(len(passes))
    counted = (same & (before[None, :] < before[:, None])).sum(axis=1)
    return _in_sections(counted, positions)


def _in_sections(counted: Array, positions: Array) -> Array:
    """The counted positions [T] in the layout of `positions`: [T], or [4 · T] whose fourth section is 0."""
    xp = module_of(positions)
    if positions.size == counted.size:
        return counted.astype(positions.dtype)
    sections = xp.tile(counted, SECTIONS).reshape(SECTIONS, -1)
    sections[-1] = 0
    return sections.reshape(positions.shape).astype(positions.dtype)


def in_decode(step: Step, by: int) -> Step:
    """The step with the positions of every pass but the first moved."""

    def moved(positions: Array, passes: Array) -> Array:
        return positions + _in_sections(module_of(passes).where(passes > 0, by, 0), positions)

    return at_positions(step, moved, PASSES)


def by_prompt(step: Step, times: int) -> Step:
    """The step with the positions of decode steps moved by `times` the prompt's length."""

    def moved(positions: Array, passes: Array, all_passes: Array) -> Array:
        xp = module_of(passes)
        length = int((all_passes == 0).sum())
        return positions + _in_sections(xp.where(passes > 0, times * length, 0), positions)

    return at_positions(step, moved, PASSES, History(PASSES))
