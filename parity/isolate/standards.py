"""The right definitions that operations are judged by: the reference has one, a foreign engine may be right in several ways."""

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.graph import Step
from engine.replay.kept import CACHE, KEPT, kept
from engine.replay.proof import HELD, proof_steps
from engine.replay.wide import without_tables

_TYPES = {"q8_0": "q8"}  # a header's names of `engine.replay.kept`'s types, where they differ

# From a model's steps to the lists of steps that compute its operations rightly; steps that two lists share are the same objects.
Standard = Callable[[Sequence[Step]], list[list[Step]]]


def foreign_standard(*, native: bool, kv_type: str) -> Standard:
    """The standard for a foreign engine.

    Its products may round their activations or not, whichever the mode; it may compute GELU exactly where ggml has a table of float16;
    what its cache keeps in a lower type, it may multiply as ggml does, which rounds the other factor as well, or in float32. If it
    does not say in which type (`kv_type` ""), its cache may be F32 or F16; of a type that is not known here it is taken for F32.
    """

    def of(steps: Sequence[Step]) -> list[list[Step]]:
        plain, other = (proof_steps(steps, native=rounds) for rounds in (native, not native))
        if not kv_type:
            as_ggml = _where_other(proof_steps(steps, native=native, kv_type="f16"), plain)
            return [plain, without_tables(plain), as_ggml, other]
        held, *further = _of_cache(steps, plain, native=native, kv_type=kv_type)
        return [held, without_tables(held), *further, _of_cache(steps, other, native=not native, kv_type=kv_type)[0]]

    return of


def _of_cache(steps: Sequence[Step], plain: Sequence[Step], *, native: bool, kv_type: str) -> list[list[Step]]:
    """The ways in which steps compute what a cache of this type keeps; `plain` are those that they are with one of F32."""
    ways = [proof_steps(steps, native=native, kv_type=kv_type)] if kv_type in HELD else []
    ways += [
        kept(plain, name) for name, what in KEPT.items() if what.part == CACHE and _TYPES.get(kv_type, kv_type) == what.type
    ]
    return [_where_other(way, plain) for way in ways] or [list(plain)]


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
