"""Random edits of one operation of an engine: what `benchmarks/edits.py` draws, and how each changes the operation."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec.structs import replace
from planted import Faulty, half_sums
from rare_edits import RARE, rare
from structural_edits import STRUCTURAL, structural
from tile_edits import TILES, tiled

from checkpoints.points import parse
from engine import ops
from engine.backend import Array
from engine.faults import CATALOGUE, FITTED, FITTED_PARTS, SEEN
from engine.graph import Altered, History, Step, WeightSource
from engine.inapplicable import NotApplicable
from engine.lift.node import GgmlOperation
from engine.replay.replay import Replay

WAYS = ("scaled", "shifted", "rolled", "permuted", "exchanged", "negated", "zeroed", "position", "operand")
# Of what an operation reads beside its operands, and of attention's heads: drawn as often as all others together.
PARTS = (
    "heads exchanged",
    "an expert's weights of another",
    "bias halved",
    "weight of the neighbouring layer",
    "scaled by 1.002",
)
_RESULTS = (
    "across heads",
    "one position stale",
    "clamped",
    "absolute",
    "one place on",
    "a head of zeros",
    "mean over positions",
    "first",
)
FURTHER = (*_RESULTS, "summed in F16", "powers of 2", "value of the layer before", "bias twice")
FAULTS = (*CATALOGUE.values(), *(fit.fault for fit in (*FITTED, *FITTED_PARTS)))
_INSIDE = ("kq", "kq_soft_max")  # rows behind a mask: what moves elements of them makes values of later positions


@dataclass(frozen=True)
class Edit:
    """One edited operation: the model's steps with the edit, the first edited step, and the kind of edit."""

    steps: list[Step]
    first: str
    how: str
    what: str


def _change(how: str, draw: random.Random) -> Callable[[Array], Array]:
    """The function that edits a value [T, …, n] in this way."""
    by = draw.choice([1 + draw.choice([1, -1]) * draw.uniform(0.005, 0.1), draw.uniform(0.5, 2.0), -1.0, 0.0, 2.0])
    plus = draw.choice([1, -1]) * draw.choice([0.003, 0.01, 0.1])
    seed, by_elements = draw.randrange(1 << 30), draw.choice([1, -1, 2, 8])
    part = draw.random()

    def some(x: Array) -> list[int]:
        return random.Random(seed).sample(range(min(x.shape[-1], 10)), min(x.shape[-1], 2))

    def changed(x: Array) -> Array:
        out = x.copy()
        if how == "exchanged":
            out[..., some(x)] = x[..., some(x)[::-1]]
        elif how == "negated":
            out[..., some(x)[0]] *= x.dtype.type(-1)
        else:
            out[..., some(x)[0] : None if part < 0.5 else some(x)[0] + 1] = 0
        return out

    ways: dict[str, Callable[[Array], Array]] = {
        "scaled": lambda x: x * x.dtype.type(by),
        "shifted": lambda x: x + x.dtype.type(plus),
        "rolled": lambda x: np.roll(x, by_elements, axis=-1),
        "permuted": lambda x: x[..., np.random.default_rng(seed).permutation(x.shape[-1])],
        "position": lambda x: np.roll(x, 1, axis=0),
    }
    return ways.get(how, changed)


def _further_change(how: str, draw: random.Random, heads: int) -> Callable[[Array], Array]:
    """The function that edits a value [T, …, n] in one of the further ways."""
    part, place = draw.random(), draw.randrange(1 << 20)

    def changed(x: Array) -> Array:
        out, count = x.copy(), x.shape[-1]
        if how == "across heads":
            pair = [place % (count // heads), count // heads * (heads - 1) + (place + 3) % (count // heads)]
            out[..., pair] = x[..., pair[::-1]]
        elif how == "one position stale":
            at = 1 + place % (len(x) - 1)
            out[at] = x[at - 1]
        elif how == "clamped":
            largest = x.dtype.type((0.2 + 0.6 * part) * np.abs(x).max())
            np.clip(x, -largest, largest, out=out)
        elif how == "absolute":
            np.abs(x, out=out)
        elif how == "one place on":
            at = place % max(1, min(count - 1, 8))
            out[..., at:-1] = x[..., at + 1 :]
        elif how == "a head of zeros":
            size = count // heads
            out[..., place % heads * size : (place % heads + 1) * size] = 0
        elif how == "mean over positions":
            out -= x.mean(axis=0, keepdims=True)
        else:
            out[:] = x[:1]
        return out

    return changed


def _further_edited(step: Step, how: str, draw: random.Random, right: dict[str, Step]) -> Step | None:
    """The step with one of the further edits; None where it does not apply."""
    point = parse(step.makes)
    if how in _RESULTS:
        scores = right.get(f"blk.{point.layer}.kq")
        heads = 1 if scores is None else int(scores.params.get("kv_heads" if point.kind[:1] in "kv" else "heads", 1))
        of_heads = point.kind in ("q", "k", "v", "q_rope", "k_rope", "q_norm", "k_norm", "kqv_out")
        if (not of_heads or heads < 2) and "head" in how:
            return None
        change = _further_change(how, draw, heads)
        return replace(step, op=lambda *inputs, **params: change(step.op(*inputs, **params)))
    if how == "summed in F16":
        return replace(step, op=half_sums) if step.op is ops.linear else None
    if how == "powers of 2":
        scale = step.params.get("scale")
        return replace(step, params={**step.params, "scale": scale * np.log(2)}) if step.op is ops.causal_soft_max else None
    if how == "value of the layer before":
        before = f"blk.{(point.layer or 0) - 1}.{point.kind}"
        return Step(step.makes, np.copy, (before,)) if before in right else None
    bias = step.weights[-1] if len(step.weights) > 1 else None
    if not isinstance(bias, str) or "bias" not in bias:
        return None
    return replace(step, weights=(*step.weights[:-1], Altered(bias, lambda source, name: source.get(name) * 2)))


def _edited(
    step: Step, how: str, draw: random.Random, right: dict[str, Step], shapes: dict[str, tuple[int, ...]]
) -> Step | None:
    """The step with this edit; None if its shapes do not allow it."""
    if how in RARE:
        return rare(step, how, draw)
    if how in TILES:
        return tiled(step, how, draw)
    if how in STRUCTURAL:
        return structural(step, how, draw, right)
    if how in FURTHER:
        return _further_edited(step, how, draw, right)
    if how in PARTS:
        return _part_edited(step, how, right)
    if how == "operand":
        order = list(right)
        at = draw.randrange(len(step.reads)) if step.reads else 0
        if not step.reads or not isinstance(step.reads[at], str) or step.reads[at] not in shapes:
            return None
        mine = shapes[str(step.reads[at])]
        alike = [
            name
            for name in order[: order.index(step.makes)]
            if shapes.get(name) == mine and name != step.reads[at] and right[name].axis == 0
        ]
        return replace(step, reads=(*step.reads[:at], draw.choice(alike), *step.reads[at + 1 :])) if alike else None
    change = _change(how, draw)
    places = [at for at, read in enumerate(step.reads) if isinstance(read, str) and read in shapes and right[read].axis == 0]
    at = draw.choice(places) if places and draw.random() < 0.5 else -1

    def op(*inputs: Any, **params: Any) -> Array:
        if at < 0:
            return change(step.op(*inputs, **params))
        return step.op(*(change(value) if number == at else value for number, value in enumerate(inputs)), **params)

    return replace(step, op=op)


def _part_edited(step: Step, how: str, right: dict[str, Step]) -> Step | None:
    """The step with an edit of a part: two heads, a weight, a bias."""
    layer, kind = parse(step.makes).layer, parse(step.makes).kind
    if how == "scaled by 1.002":
        return replace(step, op=lambda *inputs, **params: step.op(*inputs, **params) * np.float32(1.002))
    if how == "heads exchanged":
        scores = right.get(f"blk.{layer}.kq")
        heads = 0 if scores is None else int(scores.params.get("kv_heads" if kind[:1] in "kv" else "heads", 0))
        if kind not in ("q", "k", "v", "q_rope", "k_rope", "q_norm", "k_norm", "kqv_out") or heads < 2:
            return None

        def exchanged(x: Array) -> Array:
            shaped = x.reshape(len(x), heads, -1)
            return shaped[:, [1, 0, *range(2, heads)]].reshape(x.shape)

        return replace(step, op=lambda *inputs, **params: exchanged(step.op(*inputs, **params)))
    if how == "bias halved":
        if len(step.weights) < 2 or not isinstance(step.weights[-1], str) or "bias" not in step.weights[-1]:
            return None
        return replace(step, weights=(*step.weights[:-1], Altered(step.weights[-1], lambda source, name: source.get(name) / 2)))
    first = step.weights[0] if step.weights else None
    if not isinstance(first, str):
        return None
    if how == "weight of the neighbouring layer":
        other = first.replace(f"blk.{layer}.", f"blk.{(layer or 0) + 1}.")
        known = any(other in step.weights for step in right.values())
        return replace(step, weights=(other, *step.weights[1:])) if layer is not None and known and other != first else None
    if not isinstance(step.op, GgmlOperation) or step.op.name != "MUL_MAT_ID":
        return None

    def doubled(source: WeightSource, name: str) -> Array:
        weight = source.get(name).copy()
        weight[1] = weight[0]
        return weight

    return replace(step, weights=(Altered(first, doubled), *step.weights[1:]))


def _plain(step: Step, kind: str, how: str) -> bool:
    """Whether a usual edit of this step makes what an engine could compute: no row behind a mask, no history, is moved."""
    if how in RARE or how in TILES or how in STRUCTURAL:
        return True
    inside = kind in _INSIDE and (how in ("rolled", "permuted", "zeroed", "exchanged", "negated", "shifted") or how in _RESULTS)
    return step.axis == 0 and not inside and not any(isinstance(read, History) for read in step.reads)


def replay(faulty: Faulty, steps: Sequence[Step], tokens: tuple[int, ...]) -> Replay:
    """These steps run over these tokens in one pass."""
    count, transformer = len(tokens), faulty.transformer
    with np.errstate(all="ignore"):
        return Replay(steps, tokens, range(count), [0] * count, transformer.weights, transformer.backend)


def drawn(faulty: Faulty, tokens: tuple[int, ...], draw: random.Random, ways: Sequence[str] = ()) -> Edit:
    """One operation edited in some layers, in one of these ways or, where none are given, in a usual one."""
    right = {step.makes: step for step in faulty.right}
    values = replay(faulty, faulty.right, tokens).values
    shapes = {name: values[name].shape for name in right if values[name].dtype.kind == "f"}
    while True:
        how = draw.choice(ways or (WAYS if draw.random() < 0.5 else PARTS))
        chosen = draw.choice(faulty.right)
        layers = draw.choice(["one", "all", "from"])
        head, _, kind = chosen.makes.rpartition(".")
        if chosen.makes not in shapes or chosen.makes.startswith(SEEN) or not _plain(chosen, kind, how):
            continue
        seed = draw.randrange(1 << 30)
        same = [name for name in right if head and name.endswith(f".{kind}")]
        names = [chosen.makes] if layers == "one" or not head else same if layers == "all" else same[same.index(chosen.makes) :]
        edited = {name: _edited(right[name], how, random.Random(seed), right, shapes) for name in names}
        if any(step is None for step in edited.values()):
            continue
        steps = [edited.get(step.makes) or step for step in faulty.right]
        try:
            values = replay(faulty, steps, tokens).values
            for name in names:
                values[name]  # is computed when it is asked for
        except (NotApplicable, ValueError, IndexError, TypeError):
            continue  # this operation's shapes do not allow the edit
        where = chosen.makes if len(names) == 1 else f"{names[0]} … {names[-1]}"
        return Edit(steps, names[0], how, f"{how} at {where}")
