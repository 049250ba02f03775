"""A number that no entry of the catalogue lists, found from what the first difference follows, with hardly any search."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, SHAPE, STEPS, names, small_engine, unstated
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from engine.backend import Array
from engine.faults.base import kind_of
from engine.faults.edits import Then
from engine.graph import Step
from engine.replay.replay import Replay
from engine.synth import synthesize
from parity.explain.budget import Budget
from parity.explain.case import Case
from parity.explain.explain import explain
from parity.explain.rounding.one_number import asked_about
from parity.explain.rounding.systematic import followed
from parity.explain.search.search import Search
from reference.client import Reference


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A qwen2 of four layers."""
    return small_engine(tmp_path_factory.mktemp("one-number"))


def _moved(x: Array) -> Array:
    return x + x.dtype.type(0.02)


def _larger(x: Array) -> Array:
    return x * x.dtype.type(1.001)


@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize("layer", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_a_number_of_any_operation_is_a_cause_before_the_search(engine: Faulty, layer: int | None) -> None:
    """A constant added after RoPE, in all layers or in one, recorded only after each layer: named, and no arithmetic is made of it."""

    def wrong(name: str) -> bool:
        return name.endswith(".q_rope") if layer is None else name == f"blk.{layer}.q_rope"

    steps = [replace(step, op=Then(step.op, _moved)) if wrong(step.makes) else step for step in engine.right]
    explanation = explain(unstated(engine.dump(RIGHT, PROMPT, steps=steps)), engine.model, STEPS)
    assert (names(explanation), explanation.remaining, explanation.looks_like) == (["constant-added"], None, "")
    assert explanation.causes[0].named.parameters["by"] == pytest.approx(0.02, rel=1e-3)
    assert explanation.causes[0].named.layers == (None if layer is None else (layer,))
    assert explanation.variants < 200


def test_numbers_are_asked_for_at_the_first_wrong_rows_together(engine: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one number that the errors follow is found among some fifty of which few are run over all rows."""
    wrong = {f"blk.{layer}.ffn_out" for layer in range(4)}
    steps = [replace(step, op=Then(step.op, _larger)) if step.makes in wrong else step for step in engine.right]
    case = Case(unstated(engine.dump(RIGHT, PROMPT, points="embd,blk.3.l_out,logits", steps=steps)), engine.model, STEPS)
    entry = next(entry for entry in case.entries if entry.point == "blk.3.l_out")
    errors = entry.values - entry.taken(case.replay.on_host[entry.point], case.positions)
    rows: list[int] = []
    make = Case.make

    def counted(of: Case, changed: Sequence[Step], count: int, longer: Replay | None = None) -> Replay:
        rows.append(count)
        return make(of, changed, count, longer)

    monkeypatch.setattr(Case, "make", counted)
    found, complete = followed(case, entry, errors, np.isfinite(errors), Budget(60))
    best = max(found, key=lambda number: number.along)
    assert best.kind in ("ffn_up", "ffn_swiglu", "ffn_out")  # a factor of any of them is the same; rounding decides
    assert (complete, best.shifted, best.change) == (True, False, pytest.approx(1e-3, rel=0.05))
    assert 1 <= rows.count(len(PROMPT)) <= 10


def test_a_factor_of_the_model_that_several_results_have(reference: Reference, small_model: Callable[..., Path]) -> None:
    """Granite multiplies both branches by one number: errors of another one follow neither branch alone, and are no lower arithmetic's."""
    model = small_model("granite", layers=2)
    granite = Faulty(model, reference.graph(model))
    steps = [
        replace(step, op=Then(step.op, _larger)) if kind_of(step) in ("scale", "scale.2") else step for step in granite.right
    ]
    tokens = tokens_of(model, 6, seed=5)
    dump = unstated(granite.dump(Planted(()), tokens, points="embd,blk.0.l_out,logits", steps=steps))
    case = Case(dump, model, replace(STEPS, tokens=tokens))
    entry = next(entry for entry in case.entries if entry.point == "blk.0.l_out")
    errors = entry.values - entry.taken(case.replay.on_host[entry.point], case.positions)
    found, _ = followed(case, entry, errors, np.isfinite(errors), Budget(60))
    [number] = found
    assert (number.words.partition(" were ")[0], number.change) == ("scale and scale.2", pytest.approx(1e-3, rel=0.05))


def test_noise_in_the_first_row_hides_no_number(engine: Faulty) -> None:
    """A RoPE base moves nothing at position 0: an error of another origin there, 0.6 % of all, does not speak against the base."""
    steps = [
        replace(step, params={**step.params, "base": step.params["base"] * 1.002}) if "base" in step.params else step
        for step in engine.right
    ]
    dump = engine.dump(RIGHT, tokens_of(engine.model, 24, seed=1), points="embd,blk.3.l_out,logits", steps=steps)
    case = Case(unstated(dump), engine.model, STEPS)
    entry = next(entry for entry in case.entries if entry.point == "blk.3.l_out")
    errors = entry.values - entry.taken(case.replay.on_host[entry.point], case.positions)
    noise = np.random.default_rng(3).standard_normal(errors.shape[1])
    sizes = (errors**2).sum(axis=1) / entry.energy
    errors[0] = noise * np.sqrt(0.006 * sizes.sum() * entry.energy[0] / (noise @ noise))
    found, _ = followed(case, entry, errors, np.isfinite(errors), Budget(60))
    best = max(found, key=lambda number: number.along)
    assert best.words == "base were multiplied by 1.0020"


def test_numbers_of_layers_that_agree_are_not_asked_about(tmp_path: Path) -> None:
    """Seven layers in question: behind one that agrees only what is outside of all layers is asked about; with none before, everything."""
    model = tmp_path / "nine.gguf"
    synthesize(model, replace(SHAPE, layers=9), weight_type="f32", seed=11)
    nine = Faulty(model)
    planted = Planted((("rope-missing", {"at": ("q_rope", "k_rope")}, (4,)),))
    outside: dict[str, set[str] | None] = {
        "blk.0.l_out,blk.7.l_out": set(),
        "blk.1.l_out,output_norm": {"output_norm"},
        "blk.6.l_out,logits": None,
    }
    for points, wanted in outside.items():
        dump = nine.dump(planted, PROMPT, points=f"embd,{points}")
        case = Case(dump, model, STEPS)
        search = Search(case.screening(case.entries, Budget(60)))
        start = search.screening.start()
        assert len(search.screening.suspects(start)) == 7
        assert asked_about(search, start) == (search.screening.cone(start).steps if wanted is None else wanted)
