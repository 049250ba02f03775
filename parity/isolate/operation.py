"""Judge every operation by its own inputs: what entered it, our step, what came out of it.

Values are fed in the order in which an engine computed them and dropped when nobody needs them any more, so that one
layer's are held and not the model's. Nothing is inherited here: each error is the operation's own.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.isolate import NOT_OBSERVABLE, PROVEN, WRONG, Operation
from checkpoints.errors import ModelError
from checkpoints.points import parse
from engine import ops
from engine.graph import POSITIONS, TOKENS, Altered, History, Step, WeightSource, compute, name_of

from .elements import Sample, sample_product
from .looks import look_of, other_epsilon
from .values import CACHED, Value, row_errors, rows_at

# A norm is one scale a row, and no sum of many products: right ones measured 3e-14 at most, and another epsilon, the smallest
# fault known, is as small as 1e-12 where activations are large.
_NORM_LIMIT = 1e-12
# Where activations are larger still, another epsilon is below that: it is told by comparison, once a norm with smaller
# activations has shown it. Rounding doesn't prefer one epsilon to another; ten times nearer is no rounding.
_NEARER = 10.0


@dataclass
class _Found:
    """What the passes so far said of one operation."""

    nmse: float = -1.0
    position: int | None = None
    passes: int = 0
    sampled: float | None = None
    reason: str = ""
    wrong: bool = False


@dataclass
class Isolator:
    """Takes values as they come and judges each step as soon as its inputs and its output are there.

    Args:
        definitions: one or more lists of the model's steps that are right (with and without ggml's rounding, say); an
            operation is as wrong as it is by the nearest of them.
        limit: NMSE above which an operation is wrong.
    """

    definitions: Sequence[Sequence[Step]]
    weights: WeightSource
    limit: float
    sample: bool = True
    _found: dict[str, _Found] = field(default_factory=lambda: defaultdict(_Found))
    _past: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))
    _epsilons: set[float] = field(default_factory=set)

    @property
    def steps(self) -> Sequence[Step]:
        """The model's steps."""
        return self.definitions[0]

    def run(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], arriving: Iterable[tuple[str, Value]]) -> None:
        """One forward pass: its tokens and positions [T], and its values by point as they were computed."""
        missing = {step.makes for step in self.steps}
        touching: dict[str, list[int]] = defaultdict(list)
        for index, step in enumerate(self.steps):
            for name in _names(step):
                touching[name].append(index)
        waiting = set(range(len(self.steps)))
        left = Counter({name: len(users) for name, users in touching.items()})
        live = {TOKENS: Value(tokens, positions), POSITIONS: Value(positions, positions)}
        remembered = {read.of for step in self.steps for read in step.reads if isinstance(read, History)}
        self._past[POSITIONS].append(live[POSITIONS])
        for name, value in arriving:
            if name not in left:
                continue
            missing.discard(name)
            live[name] = value
            if name in remembered:
                self._past[name].append(value)
            for index in touching[name]:
                needed = _names(self.steps[index])
                if all(used in live for used in needed):
                    waiting.discard(index)
                    self._judge(index, live)
                    for used in needed:
                        left[used] -= 1
                        if not left[used]:
                            live.pop(used, None)
        for index in sorted(waiting):
            step = self.steps[index]
            lacks = [name for name in _names(step) if name in missing]
            output = "its output was not recorded as a whole" if step.makes in lacks else ""
            before = " and ".join(name for name in lacks if name != step.makes)
            self._found[step.makes].reason = output or f"its input {before} was not recorded as a whole"

    def _siblings(self, step: Step) -> list[str]:
        """Weights of the other products of the same layer."""
        layer = parse(step.makes).layer
        near = [other for other in self.steps if other is not step and parse(other.makes).layer == layer]
        return [other.weights[0].weight for other in near if other.weights and isinstance(other.weights[0], Altered)]

    def _limit(self, step: Step) -> float:
        return _NORM_LIMIT if step.op is ops.rms_norm and self.limit <= 1e-10 else self.limit

    def _judge(self, index: int, live: dict[str, Value]) -> None:
        step = self.steps[index]
        found = self._found[step.makes]
        try:
            inputs, theirs, positions = self._aligned(step, live)
        except ValueError as error:
            found.reason = str(error)
            return
        found.passes += 1
        wide = theirs.astype(np.float32, copy=False)
        best: tuple[float, int, int, int] | None = None
        limit = self._limit(step)
        for steps in self.definitions:
            try:
                ours = compute(steps[index], inputs, self.weights)
            except (ValueError, IndexError):
                shapes = ", ".join(str(list(given.shape)) for given in inputs)
                raise ModelError(f"{step.makes} cannot be computed from {shapes}.", "Is the dump of this model?") from None
            errors = row_errors(parse(step.makes).kind, ours, wide, positions)
            worst = int(np.argmax(errors))
            if best is None or errors[worst] < best[0]:
                best = float(errors[worst]), worst, int((errors > limit).sum()), len(errors)
            if best[0] <= limit:
                break
        if best is not None and best[0] > found.nmse:
            nmse, worst, wrong, count = best
            found.nmse = nmse
            found.position = int(positions[worst]) if len(positions) == count else worst + int(positions[0])
            if nmse > limit:
                look = look_of(self.definitions[-1][index], inputs[0], wide, self.weights, nmse, limit, self._siblings(step))
                where = "" if wrong == count else f"{wrong} of {count} positions"
                found.reason = "; ".join(part for part in (where, look) if part)
                found.wrong = True
        if step.op is ops.rms_norm:
            self._judge_epsilon(step, inputs, wide, positions)
        if self.sample:
            sampled = [self._sampled(steps[index], inputs, wide) for steps in self.definitions]
            if measured := [error for error in sampled if error is not None]:
                found.sampled = max(found.sampled or 0.0, min(measured))

    def _judge_epsilon(
        self, step: Step, inputs: list[NDArray[np.float32]], theirs: NDArray[np.float32], positions: NDArray[np.int64]
    ) -> None:
        """Hold a norm against the epsilons that other norms have shown, or learn one from it."""
        found = self._found[step.makes]
        if found.wrong:
            eps = other_epsilon(step, inputs[0], theirs, self.weights, self._limit(step))
            self._epsilons |= {eps} if eps is not None else set()
            return
        for eps in sorted(self._epsilons):
            made = compute(replace(step, params={**step.params, "eps": eps}), inputs, self.weights)
            error = float(row_errors(parse(step.makes).kind, made, theirs, positions).max())
            if error * _NEARER < found.nmse:
                found.wrong = True
                found.reason = f"nearer with an epsilon of {eps:.2g}, as in other norms, than with {step.params['eps']:.2g}"

    def _sampled(self, step: Step, inputs: list[NDArray[np.float32]], theirs: NDArray[np.float32]) -> float | None:
        if "native" not in step.params or not isinstance(step.weights[0], Altered):
            return None
        chosen = Sample.of(step.makes, *theirs.shape)
        bias = step.weights[1] if len(step.weights) > 1 else None
        added = self.weights.get(bias) if isinstance(bias, str) else None
        return sample_product(
            chosen, inputs[0], theirs, self.weights, step.weights[0].weight, added, native=bool(step.params["native"])
        )

    def _aligned(
        self, step: Step, live: dict[str, Value]
    ) -> tuple[list[NDArray[np.float32]], NDArray[np.float32], NDArray[np.int64]]:
        """The step's inputs and output at the positions that all of them have.

        Raises:
            ValueError: they have none in common, or a history has gaps; the message says which.
        """
        made = live[step.makes]
        whole = parse(step.makes).kind in CACHED
        rows = [live[read] for read in step.reads if isinstance(read, str) and parse(read).kind not in CACHED]
        common = made.positions
        for value in [] if whole else rows:
            common = np.intersect1d(common, value.positions)
        if not len(common):
            raise ValueError("its inputs and its output were recorded at different positions")
        seen = int(made.positions.max()) + 1 - int(self._past[POSITIONS][0].positions[0])
        inputs: list[NDArray[np.float32]] = []
        for read in step.reads:
            if isinstance(read, History):
                inputs.append(self._history(read.of, seen))
            elif isinstance(read, str) and parse(read).kind in CACHED:
                inputs.append(live[read].data)
            elif isinstance(read, str):
                inputs.append(rows_at(read, live[read], common))
            else:
                raise ValueError("it reads a part of a value")
        return inputs, made.data if whole else rows_at(step.makes, made, common), made.positions if whole else common

    def _history(self, name: str, seen: int) -> NDArray[np.float32]:
        parts = self._past[name]
        positions = np.concatenate([part.positions for part in parts])
        data = np.concatenate([part.data.reshape(len(part.positions), -1) for part in parts])
        first = int(self._past[POSITIONS][0].positions[0])
        order = {int(position): row for row, position in enumerate(positions)}
        wanted = range(first, first + seen)
        if gap := next((position for position in wanted if position not in order), None):
            raise ValueError(f"no whole row of {name} at position {gap}, which the cache held")
        rows = data[[order[position] for position in wanted]]
        return rows[:, 0] if name == POSITIONS else rows

    def operations(self) -> list[Operation]:
        """The verdict on each step, in the order of the model."""
        return [self._operation(step) for step in self.steps]

    def _operation(self, step: Step) -> Operation:
        point, found = parse(step.makes), self._found[step.makes]
        made = Operation(point.kind, point.layer, NOT_OBSERVABLE, weight=self._weight(step), reason=found.reason)
        if found.nmse < 0:
            return made
        right = not found.wrong
        return replace(
            made,
            status=PROVEN if right else WRONG,
            nmse=found.nmse,
            position=found.position,
            passes=found.passes,
            sampled=found.sampled,
            reason="" if right else found.reason,
        )

    def _weight(self, step: Step) -> str:
        first = step.weights[0] if step.weights else None
        name = first if first is None or isinstance(first, str) else first.weight
        if name is None:
            return ""
        from gguf import GGMLQuantizationType

        try:
            return str(GGMLQuantizationType(self.weights.raw(name)[1]).name)
        except (KeyError, ValueError, ModelError):
            return ""


def _names(step: Step) -> list[str]:
    """What it reads but tokens and positions, and what it makes, each once."""
    read = [name_of(read) for read in step.reads]
    return [name for name in dict.fromkeys(read) if name not in (TOKENS, POSITIONS)] + [step.makes]
