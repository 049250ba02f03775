"""`parity explain --budget`: how late the answer comes, counted in computed steps, not in seconds."""

import pytest
from explaining import only, small_engine
from planted import Faulty

from parity.explain.explain import ExplainOptions, explain


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2 with groups of 7 query heads."""
    return small_engine(tmp_path_factory.mktemp("budget"))


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
