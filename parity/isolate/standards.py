"""The right definitions that operations are judged by: the reference has one, a foreign engine may be right in several ways."""

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.graph import Step
from engine.replay.proof import proof_steps
from engine.replay.wide import without_tables

# From a model's steps to the lists of steps that compute its operations rightly; steps that two lists share are the same objects.
Standard = Callable[[Sequence[Step]], list[list[Step]]]


def foreign_standard(*, native: bool, kv_type: str) -> Standard:
    """The standard for a foreign engine.

    Its products may round their activations or not, whichever the mode; it may compute GELU exactly where ggml has a table of float16;
    and if it does not say so (`kv_type` ""), its cache may be F32 or F16.
    """

    def of(steps: Sequence[Step]) -> list[list[Step]]:
        first = proof_steps(steps, native=native, kv_type=kv_type or "f32")
        further = [] if kv_type else [_where_other(proof_steps(steps, native=native, kv_type="f16"), first)]
        return [first, without_tables(first), *further, proof_steps(steps, native=not native, kv_type=kv_type or "f32")]

    return of


def _where_other(steps: Sequence[Step], known: Sequence[Step]) -> list[Step]:
    """Steps, each replaced by the known one that is equal to it."""
    return [old if _alike(step, old) else step for step, old in zip(steps, known, strict=True)]


def _alike(step: Step, other: Step) -> bool:
    same_params = step.params is other.params or step.params.items() == other.params.items()
    return step.op == other.op and same_params


class Define(Protocol):
    """Gives the steps that compute a model's operations as the reference should."""

    def __call__(self, steps: Sequence[Step], /, *, native: bool, kv_type: str) -> list[Step]:
        """One step for each of `steps`."""


def reference_standard(define: Define, *, native: bool, kv_type: str) -> Standard:
    """The standard for llama.cpp itself."""
    return lambda steps: [define(steps, native=native, kv_type=kv_type)]
