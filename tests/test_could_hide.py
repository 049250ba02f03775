"""An answer that rests on an assumed arithmetic says how large a fault it would not see."""

import pytest
from explaining import PROMPT, RIGHT, STEPS, unstated
from msgspec.structs import replace
from planted import Faulty, half_sums

from engine import ops
from engine.backend import Array
from engine.faults.edits import Then
from parity.explain.case import Case
from parity.explain.explain import explain
from reports.explanation import as_json, lines


@pytest.mark.slow
def test_the_factor_that_would_pass_leaves_the_error_that_was_seen(engine: Faulty) -> None:
    """Planted in a float32 engine, each factor that the answer names makes the error that the assumed arithmetic is said to make."""
    right = [replace(step, op=half_sums) if step.op is ops.linear else step for step in engine.right]
    dump = unstated(engine.dump(RIGHT, PROMPT, steps=right))
    answer = explain(dump, engine.model, STEPS)
    assert answer.precision_assumed
    assert answer.first is not None
    assert {name for name, _ in answer.hides} >= {"blk.0.v", "blk.0.ffn_out", "blk.0.l_out"}
    seen = max(next(e for e in Case(dump, engine.model, STEPS).entries if e.point == answer.first.checkpoint).base)
    for name, part in answer.hides:

        def larger(x: Array, factor: float = 1 + part) -> Array:
            return x * x.dtype.type(factor)

        steps = [replace(step, op=Then(step.op, larger)) if step.makes == name else step for step in engine.right]
        planted = Case(engine.dump(RIGHT, PROMPT, steps=steps), engine.model, STEPS).entries
        over = next(entry for entry in planted if entry.over.any())
        assert over.point == answer.first.checkpoint
        assert max(over.base) == pytest.approx(seen, rel=0.1), name
    text = "\n".join(line.plain for line in lines(answer, 300))
    assert f"a fault as small as this would pass: {answer.hides[0][0]} {1 + answer.hides[0][1]:.5g} times the right one" in text
    assert as_json(answer)["hides"][0] == {"checkpoint": answer.hides[0][0], "part": answer.hides[0][1]}


def test_an_answer_that_assumes_nothing_hides_nothing(engine: Faulty) -> None:
    """A right float32 engine's answer names no factor."""
    assert explain(engine.dump(RIGHT, PROMPT), engine.model, STEPS).hides == ()
