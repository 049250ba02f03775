"""Runs changed lists of steps against the right one: what is still right is not computed again.

One pass over all positions. Rows do not depend on how the sequence was cut into passes, but for steps that read
`passes`; so one replay stands for a prompt and the tokens generated after it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .backend import Array, Backend
from .graph import PASSES, POSITIONS, TOKENS, Altered, History, Step, WeightSource, compute

Visit = Callable[[str, Array], bool]  # a value that differs from the right run's; False ends the replay


class Replay:
    """The right run of a model over some tokens, every value of it kept, and replays of changed lists.

    Args:
        positions, passes: int64 [T]; the position of each token, and the number of the forward pass it belongs to.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        tokens: Sequence[int],
        positions: Sequence[int],
        passes: Sequence[int],
        weights: WeightSource,
        backend: Backend,
    ) -> None:
        self.weights = weights
        given = {TOKENS: tokens, POSITIONS: positions, PASSES: passes}
        self.rows = len(tokens)
        self.values: dict[str, Array] = {
            name: backend.array(np.asarray(numbers, dtype=np.int64)) for name, numbers in given.items()
        }
        self._right = {step.makes: step for step in steps}
        for step in steps:
            self.values[step.makes] = self._compute(step, {})

    def _compute(self, step: Step, changed: dict[str, Array]) -> Array:
        names = (read.of if isinstance(read, History) else read for read in step.reads)
        inputs = [changed[name] if name in changed else self.values[name] for name in names]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # faults overflow: that is what they do
            return compute(step, inputs, self.weights)

    def run(self, steps: Sequence[Step], visit: Visit, begin: int = 0) -> dict[str, Array]:
        """Compute what differs from the right run, in order, until `visit` has seen enough.

        `begin` is the number of steps at the start that are known to be right. A value that comes out bit-equal to the
        right one counts as right, so that what reads it is not computed.

        Returns:
            The values that differ, by name.

        Raises:
            ValueError: the model's shapes do not allow this change.
        """
        changed: dict[str, Array] = {}
        for step in steps[begin:] if begin else steps:
            right = self._right.get(step.makes)
            if right is step:
                if changed.keys().isdisjoint(names_read(step)):
                    continue
            elif right is not None and changed.keys().isdisjoint(names_read(step)) and self._same_weights(step, right):
                continue
            made = self._compute(step, changed)
            before = self.values.get(step.makes)
            if before is not None:
                if made.shape != before.shape:
                    raise ValueError(f"{step.makes} has shape {made.shape} instead of {before.shape}")
                if bool((made == before).all()):
                    continue
            changed[step.makes] = made
            if not visit(step.makes, made):
                break
        return changed

    def _same_weights(self, step: Step, right: Step) -> bool:
        """Whether a changed step differs by its weights only, and those come out as the very same arrays."""
        if step.op is not right.op or step.reads != right.reads or step.params != right.params:
            return False
        for new, old in zip(step.weights, right.weights, strict=True):
            if new == old:
                continue
            if not (isinstance(new, Altered) and isinstance(old, str)):
                return False
            if new.make(self.weights, new.weight) is not self.weights.get(old):
                return False
        return True


def names_read(step: Step) -> tuple[str, ...]:
    """The names of the values that a step reads, histories included."""
    return tuple([read.of if isinstance(read, History) else read for read in step.reads])
