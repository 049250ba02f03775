"""`parity explain` names a known fault and a wrong number in one operation, neither of which gets past it alone."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, names
from msgspec.structs import replace
from planted import Faulty

from engine.faults import CATALOGUE, plant
from engine.faults.edits import Then
from engine.faults.rotation import with_rotary
from engine.graph import Step
from parity.explain.explain import ExplainOptions, explain

Edit = Callable[[Step], Step]


def times(factor: float, step: Step) -> Step:
    """The operation's result, multiplied."""
    return replace(step, op=Then(step.op, lambda x: x * np.float32(factor)))


def of_kind(steps: Sequence[Step], kind: str, edit: Edit) -> list[Step]:
    """The steps with one kind of them edited."""
    return [edit(step) if step.makes.rpartition(".")[2] == kind else step for step in steps]


CASES: dict[str, tuple[tuple[str, dict[str, object]], str, Edit, str]] = {
    "the pairs of RoPE, and its base": (
        ("rope-pairs", {"at": ("q_rope",)}),
        "q_rope",
        partial(with_rotary, base=5000.0),
        "rope-base",
    ),
    "a bias, and a factor": (("no-qkv-bias", {"at": ("v",)}), "v", partial(times, 1.1), "multiplier"),
    "a matrix, and a factor": (("transposed", {"at": ("attn_out",)}), "attn_out", partial(times, 0.9), "multiplier"),
    "a mask, and the attention's scale": (
        ("mask-shifted", {}),
        "kq_soft_max",
        lambda step: replace(step, params={**step.params, "scale": 1.3 * step.params["scale"]}),
        "attn-scale",
    ),
}


@pytest.mark.parametrize("layers", [None, (2,)])
@pytest.mark.parametrize("case", CASES)
def test_a_fault_and_a_number_of_one_operation_are_both_named(
    engine: Faulty, case: str, layers: tuple[int, ...] | None
) -> None:
    """All points show that it is one operation; the number is fitted on top of each fault that this operation may have."""
    (fault, parameters), kind, edit, number = CASES[case]
    wrong = plant(engine.right, CATALOGUE[fault], layers, **parameters)
    chosen = {step.makes for step in engine.right if layers is None or step.makes.startswith("blk.2.")}
    steps = of_kind(wrong, kind, lambda step: edit(step) if step.makes in chosen else step)
    answer = explain(engine.dump(RIGHT, PROMPT, points="*", steps=steps, bare=False), engine.model, ExplainOptions(budget=30))
    assert answer.remaining is None
    assert set(names(answer)) == {fault, number}
    assert {cause.named.layers for cause in answer.causes} == {layers}
