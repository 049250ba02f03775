"""Faults of the input tokens. Positions keep their numbers: the dump's position t holds another token."""

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps

_CHANGES: dict[str, Callable[[Any, Array], Array]] = {
    "the first one is missing": lambda xp, ids: xp.concatenate([ids[1:], ids[-1:]]),
    "the first one is doubled": lambda xp, ids: xp.concatenate([ids[:1], ids[:-1]]),
    "a 0 stands in front": lambda xp, ids: xp.concatenate([ids[:1] * 0, ids[:-1]]),
    "the first one is 0": lambda xp, ids: xp.concatenate([ids[:1] * 0, ids[1:]]),
    "in reverse": lambda _xp, ids: ids[::-1],
}


# Models that scale the embedding call the row itself node.embd.
_LOOKED_UP = ("embd", "node.embd")


def _moved(ids: Array, take: Any, *, how: str) -> Array:
    return ops.get_rows(_CHANGES[how](module_of(ids), ids), take)


def _change(step: Step, right: Steps, parameters: Parameters) -> Step:
    if step.makes == "embd" and "node.embd" in right:
        return step  # it is made from the row, which is changed
    if step.op is not ops.get_rows:
        raise NotApplicable(f"{step.makes} is not a plain look-up of rows")
    return replace(step, op=_moved, params={"how": parameters["tokens"]})


FAULTS = (
    Fault(
        name="bos",
        kinds=_LOOKED_UP,
        change=_change,
        what="the beginning of the sequence is wrong: {tokens}",
        symptom="position 0 is another token, all later ones are shifted",
        fix="`parity tokens` shows the ids that llama.cpp gives the prompt: one BOS, if the model wants one",
        seen="tokenizers and chat templates that both add BOS, or neither",
        parameters={"tokens": ("the first one is missing", "the first one is doubled")},
        whole=True,
        once=True,
    ),
    Fault(
        name="prompt-shifted",
        kinds=_LOOKED_UP,
        change=_change,
        what="the prompt's tokens are not those of the reference: {tokens}",
        symptom="embd is that of another token",
        fix="token t of the prompt is row t of the batch",
        seen="id buffers with an empty slot for BOS",
        parameters={"tokens": ("a 0 stands in front", "the first one is 0", "in reverse")},
        whole=True,
        once=True,
    ),
)
