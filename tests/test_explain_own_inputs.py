"""Behind ggml's table of GELU a record may differ by what the table costs, but not from what its operation makes of its own inputs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from explaining import RIGHT
from msgspec.structs import replace
from planted import PATIENT, Faulty, tokens_of

from checkpoints.answers.explain import Explanation
from checkpoints.points import LOGITS, OUTPUT_NORM
from engine import ops
from engine.backend import Array
from engine.faults.edits import Then
from engine.graph import Step
from engine.replay.precision import rounded
from engine.replay.wide import without_tables
from parity.explain.case import Case
from parity.explain.rounding.own_inputs import contradicted
from reference.client import Reference

PLACE = "blk.1.l_out"


@pytest.fixture(scope="module")
def engine(reference: Reference, small_model: Callable[..., Path]) -> Faulty:
    """A small gemma3, whose feed-forward uses GELU."""
    model = small_model("gemma3")
    return Faulty(model, reference.graph(model))


def test_a_recorder_that_rounds_blames_no_operation(engine: Faulty) -> None:
    """Records in F16 of a right engine: their sums are not those of the rounded operands, which is no fault."""
    dump = engine.dump(RIGHT, tokens_of(engine.model, 5, seed=3), points="blk.1.*", size=1 << 20)
    half = {name: replace(rows, values=rows.values.astype(np.float16).astype(np.float32)) for name, rows in dump.points.items()}
    nothing = Explanation(records=1, differing=0, first=None, last_agreement=None)
    assert contradicted(Case(replace(dump, points=half), engine.model, PATIENT), nothing) is nothing


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [True, False])
def test_an_operation_that_contradicts_its_own_inputs_is_wrong(engine: Faulty, wrong: bool) -> None:
    """Of two engines without the table, one sums 1.0007 times too much: its own operands tell; of the right one nothing is said."""

    def larger(x: Array) -> Array:
        return x * np.float32(1.0007)

    steps = without_tables(engine.right)
    if wrong:
        steps = [replace(step, op=Then(step.op, larger)) if step.makes == PLACE else step for step in steps]
    dump = engine.dump(RIGHT, tokens_of(engine.model, 5, seed=3), points="*", size=1 << 20, steps=steps)
    nothing = Explanation(records=1, differing=0, first=None, last_agreement=None)
    answer = contradicted(Case(dump, engine.model, PATIENT), nothing)
    if not wrong:
        assert answer is nothing
        return
    assert answer.first is not None
    assert answer.placed is not None
    assert (answer.first.checkpoint, answer.placed.operations) == (PLACE, (PLACE,))
    assert answer.law == "every element is 1.0007 times the right one"
    assert not answer


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "arithmetic"), [(1.0, True), (1.0007, False)])
def test_a_product_that_lower_arithmetic_rounds_is_that_arithmetics(engine: Faulty, factor: float, arithmetic: bool) -> None:
    """The logits of an engine in TF32, which does not say so: its own rounding of the product is no fault, a factor beside it is."""

    def scaled(x: Array) -> Array:
        return x * np.float32(factor)

    steps = rounded(without_tables(engine.right), "tf32", storage=False)
    steps = [replace(step, op=Then(step.op, scaled)) if step.makes == LOGITS else step for step in steps]
    points = f"{OUTPUT_NORM},{LOGITS}"
    dump = engine.dump(RIGHT, tokens_of(engine.model, 5, seed=3), points=points, size=1 << 20, steps=steps)
    assert dump.header is not None
    header = replace(dump.header, compute="")
    answer = contradicted(
        Case(replace(dump, header=header), engine.model, PATIENT),
        Explanation(records=1, differing=0, first=None, last_agreement=None),
    )
    assert bool(answer) is arithmetic
    assert ("tf32" in (answer.precision_only, *answer.precision_alike), answer.precision_assumed) == (arithmetic, arithmetic)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [True, False])
def test_an_operation_whose_inputs_agree_is_held_against_them(engine: Faulty, wrong: bool) -> None:
    """Sixteen values and a sketch of each row, from behind GELU's table: an operation that reads what agrees and makes one position 2 % too
    large is wrong, whatever the table's cost; a right engine that sums otherwise is not.
    """

    def larger(x: Array) -> Array:
        out = x.copy()
        out[-1] *= np.float32(1.02)
        return out

    def wide(x: Array, weight: Array, bias: Array | None = None) -> Array:
        product = (x.astype(np.float64) @ weight.reshape(-1, x.shape[1]).T.astype(np.float64)).astype(np.float32)
        return product if bias is None else product + bias

    place = "blk.1.q_rope"
    steps = [replace(step, op=wide) if step.op is ops.linear else step for step in engine.right]
    if wrong:
        steps = [replace(step, op=Then(step.op, larger)) if step.makes == place else step for step in steps]
    dump = engine.dump(RIGHT, tokens_of(engine.model, 5, seed=3), points="*", size=16, bare=False, steps=steps)
    case = Case(dump, engine.model, PATIENT)
    case.entries = [replace(entry, limit=np.maximum(entry.limit, 1e-2)) for entry in case.entries]
    nothing = Explanation(records=1, differing=0, first=None, last_agreement=None)
    answer = contradicted(case, nothing)
    if not wrong:
        assert answer is nothing
        return
    assert answer.placed is not None
    assert answer.placed.operations == (place,)
    assert answer.law == "every element is 1.02 times the right one"


@pytest.mark.parametrize(("error", "wrong"), [(1e-7, False), (1e-3, True)])
def test_a_sum_that_all_but_cancels_is_judged_by_the_largest_row(
    reference: Reference, small_model: Callable[..., Path], error: float, wrong: bool
) -> None:
    """A router's row of almost nothing may be off by what float32 rounds its terms to, but not by a thousandth of a large row."""
    place = "blk.1.ffn_moe_logits"

    def cancelled(x: Array) -> Array:
        out = x.copy()
        out[2] *= np.float32(1e-4)
        return out

    def off(x: Array) -> Array:
        out = cancelled(x)
        out[2] += np.float32(error * np.abs(x).max())
        return out

    model = small_model("qwen2moe")
    engine = Faulty(model, reference.graph(model))

    def ending_in(change: Callable[[Array], Array]) -> list[Step]:
        return [replace(step, op=Then(step.op, change)) if step.makes == place else step for step in engine.right]

    points = f"blk.1.ffn_norm,{place}"
    dump = engine.dump(RIGHT, tokens_of(engine.model, 5, seed=3), points=points, size=1 << 20, steps=ending_in(off))
    case = Case(dump, engine.model, PATIENT)
    right = ending_in(cancelled)
    case.take(right, case.beside(right))
    nothing = Explanation(records=1, differing=0, first=None, last_agreement=None)
    assert (contradicted(case, nothing) is not nothing) == wrong
