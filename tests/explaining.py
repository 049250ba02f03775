"""A small engine to plant faults in, and its dumps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from planted import Faulty, Planted

from checkpoints.answers.explain import Explanation
from checkpoints.record import Dump
from engine import graph
from engine.backend import Array
from engine.graph import Step
from engine.replay import batched, right_values
from engine.synth import Shape, synthesize
from parity.explain import budget as explain_budget
from parity.explain.case import ExplainOptions

SHAPE = Shape("qwen2", 4, 112, 14, 2, 0, 128, 300)
PROMPT = (1, 17, 40, 299, 5, 5, 80, 3)
RIGHT = Planted(())
STEPS = ExplainOptions(
    budget=20_000
)  # some thousand candidates of a small engine, where the fixture `computed` makes steps the clock


def count_steps(monkeypatch: pytest.MonkeyPatch, per_second: int = 1) -> list[int]:
    """Count the steps that are computed, and make the count the clock of budgets, so that answers are the same on any machine.

    Seconds would make a test of a budget a matter of chance; what a search does is not changed, only how its time is told.
    """
    count = [0]
    plain: Callable[..., Any] = graph.compute

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        return plain(*arguments)

    for module in (right_values, batched):
        monkeypatch.setattr(module, "compute", counted)
    monkeypatch.setattr(explain_budget, "perf_counter", lambda: count[0] / per_second)
    return count


def small_engine(folder: Path) -> Faulty:
    """A qwen2 with groups of 7 query heads."""
    path = folder / "small.gguf"
    synthesize(path, SHAPE, weight_type="f32", seed=11)
    return Faulty(path)


def only(engine: Faulty, *faults: tuple[str, dict[str, object], tuple[int, ...] | None], points: str = "default") -> Dump:
    """The dump of an engine with these faults and no others."""
    return engine.dump(Planted(faults), PROMPT, points=points)


def unstated(dump: Dump) -> Dump:
    """The same dump from an engine that does not state its arithmetic."""
    assert dump.header is not None
    return replace(dump, header=replace(dump.header, compute=""))


def edited(engine: Faulty, name: str, change: Callable[[Array], Array], points: str = "*", size: int = 1 << 20) -> Dump:
    """The dump of an engine in which the result of one step is changed."""

    def wrong(step: Step) -> Step:
        return replace(step, op=lambda *inputs, **params: change(step.op(*inputs, **params)))

    steps = [wrong(step) if step.makes == name else step for step in engine.right]
    return engine.dump(RIGHT, PROMPT, points=points, size=size, steps=steps)


def names(explanation: Explanation) -> list[str]:
    """The causes' names."""
    return [cause.named.fault for cause in explanation.causes]
