"""`parity explain --budget`: how late the answer comes, counted in computed steps, not in seconds."""

import pytest
from explaining import only
from planted import Faulty

from parity.explain import budget as budgets
from parity.explain.budget import Budget
from parity.explain.explain import ExplainOptions, explain


@pytest.mark.slow
@pytest.mark.parametrize("budget", [200, 700, 2000, 5000])
def test_the_answer_comes_at_most_one_replay_late(engine: Faulty, computed: list[int], budget: int) -> None:
    """Once the budget is spent, not more is computed than one candidate's replay."""
    points = "embd,blk.0.l_out,blk.3.l_out,output_norm,logits"
    dump = only(engine, ("activation", {"activation": "ReLU"}, (1,)), ("gqa-modulo", {}, (2,)), points=points)
    computed[0] = 0
    explanation = explain(dump, engine.model, ExplainOptions(budget=budget))
    assert not explanation.complete
    assert explanation.remaining is not None
    assert budget / 2 < computed[0] <= budget + len(engine.right)  # the search gets more than half of it


def test_a_budget_of_nothing_computes_the_right_run_alone(engine: Faulty, computed: list[int]) -> None:
    """The place of the first difference is reported however small the budget is."""
    dump = only(engine, ("activation", {"activation": "ReLU"}, None))
    computed[0] = 0
    explanation = explain(dump, engine.model, ExplainOptions(budget=0))
    assert (explanation.complete, explanation.variants) == (False, 0)
    assert explanation.first is not None
    assert computed[0] <= len(engine.right), explanation


def test_a_busy_machine_is_asked_again_for_the_processors_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute that passed with half of it computed is not the end; the minute that was computed is, once the clock is asked again."""
    now = {"passed": 1000.0, "computing": 10.0}
    monkeypatch.setattr(budgets, "perf_counter", lambda: now["passed"])
    monkeypatch.setattr(budgets, "process_time", lambda: now["computing"])
    budget = Budget(None)
    for passed, computing, late in [(61, 30, False), (2, 1, False), (30, 30, True), (0, 0, True)]:
        now["passed"] += passed
        now["computing"] += computing
        assert budget.late is late


@pytest.mark.parametrize(
    ("seconds", "passed", "computing", "late"),
    [
        (60.0, 59, 59, False),
        (60.0, 61, 3, True),
        (None, 61, 59, False),
        (None, 61, 61, True),
        (None, 59, 110, False),
        (None, 301, 20, True),
    ],
)
def test_who_states_no_budget_gives_processor_time(
    monkeypatch: pytest.MonkeyPatch, seconds: float | None, passed: float, computing: float, late: bool
) -> None:
    """A stated budget is time that passes; without one other work on the machine shortens no search of less than five minutes."""
    now = {"passed": 1000.0, "computing": 10.0}
    monkeypatch.setattr(budgets, "perf_counter", lambda: now["passed"])
    monkeypatch.setattr(budgets, "process_time", lambda: now["computing"])
    whole = Budget(seconds)
    half = whole.part(0.5)
    now["passed"] += passed
    now["computing"] += computing
    assert whole.late is late
    assert half.late
