"""How `parity explain` computes many candidates: together, from what is known already, and each of them once."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explaining import PROMPT, only
from msgspec.structs import replace
from numpy.typing import NDArray
from planted import PATIENT, Faulty, Planted, tokens_of
from slow import slow_but

from engine.backend import Array
from engine.faults import CATALOGUE, Planting, plant
from engine.graph import POSITIONS, Step
from engine.replay.adjoint import derivatives
from engine.replay.replay import Replay
from parity.explain.budget import Budget
from parity.explain.explain import Case, ExplainOptions, explain
from parity.explain.findings.leads import mended_share
from parity.explain.search.alike import Alike
from parity.explain.search.carry import carry, steps_between
from parity.explain.search.likely import Likely
from parity.explain.search.scopes import stages
from parity.explain.search.state import Candidate, Layers, RecordKey, Screened
from parity.explain.search.sweep import Sweep, screened
from reference.client import Reference


def test_single_layers_are_screened_together_as_one_by_one(engine: Faulty) -> None:
    """Laying candidates one after the other gives what each gives alone: attention keeps them apart."""
    case = Case(only(engine), engine.model, ExplainOptions())
    names = [step.makes for step in engine.right]
    steps = engine.right[names.index("blk.1.l_out") + 1 : names.index("blk.3.l_out") + 1]
    rng = np.random.default_rng(2)
    weights = case.replay.weights
    shape = (len(PROMPT), engine.transformer.hp.n_embd)
    outputs = [weights.array(rng.standard_normal(shape).astype(np.float32)) for _ in range(3)]
    positions = weights.array(case.positions)
    together = carry(steps, "blk.1.l_out", outputs, {POSITIONS: positions}, weights)
    for single, many in zip(outputs, together, strict=True):
        alone = next(carry(steps, "blk.1.l_out", [single], {POSITIONS: positions}, weights))
        assert np.abs(alone - many).max() < 1e-5 * np.abs(alone).max()


# Latent attention; recurrent layers, in rwkv7 with values of the first one that all others read.
_CARRIED_FROM = {"rwkv7": [1, 2], "deepseek2": [0, 1, 2], "qwen3next": [0, 1, 2]}


@pytest.mark.parametrize("name", slow_but(_CARRIED_FROM, "rwkv7"))
def test_what_a_layer_changes_is_carried_on_from_its_output_alone(
    name: str, small_model: Callable[..., Path], reference: Reference
) -> None:
    """Also through operations that mix rows; from layers of which later ones read more than the output nothing is carried on."""
    model = small_model(name)
    engine = Faulty(model, reference.graph(model))
    prompt, end = tokens_of(model, 7, seed=1), "blk.3.l_out"
    case = Case(engine.dump(Planted(()), prompt, points=end), model, ExplainOptions(tokens=prompt))
    state = case.screening(case.entries, Budget(60)).start()
    assert [layer for layer in range(3) if steps_between(state, layer, end)] == _CARRIED_FROM[name]
    for layer in _CARRIED_FROM[name]:
        steps = plant(state.steps, CATALOGUE["norm-skipped"], (layer,))
        changed = case.replay.run(steps, lambda _name, _value: True)
        here = f"blk.{layer}.l_out"
        steps = steps_between(state, layer, end)
        [alone] = carry(steps, here, [changed[here]], case.replay.values, case.replay.weights)
        several = [*carry(steps, here, [changed[here], case.replay.values[here]], case.replay.values, case.replay.weights)]
        size = np.abs(changed[end]).max()
        assert np.abs(alone - changed[end]).max() < 1e-5 * size
        assert np.abs(several[0] - changed[end]).max() < 1e-5 * size
        assert np.abs(several[1] - case.replay.values[end]).max() < 1e-5 * size
        assert np.abs(changed[end] - case.replay.values[end]).max() > 1e-3 * size


def test_candidates_are_computed_together_as_one_by_one(engine: Faulty) -> None:
    """Versions of a model that share one run give the same values as each in a run of its own."""
    replay = Case(only(engine), engine.model, ExplainOptions()).make(engine.right, 3)
    planting = Planting(engine.right)
    chosen = ("rope-missing", "no-qkv-bias", "activation", "attn-scale", "layer-twice", "softmax-axis", "gqa-modulo", "no-gate")
    faults = [CATALOGUE[name] for name in chosen]
    variants = [(fault, fault.variants(planting.right)[0]) for fault in faults]
    edits = [planting.edits(fault, None, parameters) for fault, parameters in variants]
    together = replay.run_batch(edits, len(engine.right), frozenset(), lambda _name, shown: [True] * len(shown))
    for (fault, parameters), shown in zip(variants, together, strict=True):
        alone = replay.run(planting.of(fault, None, parameters), lambda _name, _value: True)["logits"]
        assert shown is not None
        assert np.abs(alone - shown["logits"]).max() < 1e-5 * np.abs(alone).max(), fault.name


@pytest.mark.parametrize("name", slow_but(["mamba", "minimax-01", "deepseek32", "grovemoe"], "mamba", "grovemoe"))
def test_a_fault_of_a_layer_and_of_the_final_norm_is_named(
    name: str, small_model: Callable[..., Path], reference: Reference
) -> None:
    """A fault of one layer may change steps of no layer, too: what it does is not known from that layer's output alone.

    In grovemoe others beside it, computed together, name experts that do not exist.
    """
    model = small_model(name)
    engine = Faulty(model, reference.graph(model))
    prompt = tokens_of(model, 8, seed=1)
    parameters = CATALOGUE["norm-weight-missing"].variants({step.makes: step for step in engine.right})[0]
    planted = Planted((("norm-weight-missing", parameters, (1,)),))
    dump = engine.dump(planted, prompt, points="embd,output_norm,logits")
    answer = explain(dump, model, ExplainOptions(tokens=prompt, budget=PATIENT.budget))
    assert [cause.named.fault for cause in answer.causes] == ["norm-weight-missing"]


class _Chosen(Likely):
    """Of the candidates every so many are likely; none if that is 0."""

    every = 0

    def among(self, name: str, values: Mapping[int, Array], rows: int) -> set[int]:
        return set(list(values)[:: self.every]) if self.every else set()

    def likely_effects(self, effects: Mapping[int, NDArray[np.float64]]) -> set[int]:
        return set(list(effects)[:: self.every]) if self.every else set()


@pytest.mark.parametrize("every", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_what_is_unlikely_in_a_layer_is_screened_all_the_same(engine: Faulty, every: int) -> None:
    """Whichever candidates are carried on first, and whatever was seen in another layer, all of them get as far as alone in their layer."""
    case = Case(only(engine, ("no-gate", {}, (2,))), engine.model, ExplainOptions())
    screening = case.screening(case.entries, Budget(60))
    state = screening.start()
    scopes: list[Layers] = [(1,), (2,)]
    candidates = {
        scope: [candidate for candidate in screening.candidates(state, scope) if candidate.fault.shows is None]
        for scope in scopes
    }
    assert state.first is not None
    base = screening.left(state.first, screening.replay(state, 1).values[case.entries[state.first.point].point])

    def changing(results: Sequence[tuple[Candidate, Screened]], least: float) -> dict[int, RecordKey | None]:
        """The places of those that change the first place by that part: what changes nothing is rounding, which depends on the company."""
        return {id(candidate): place for candidate, (place, error) in results if abs(error - base) > least * base}

    alone = [result for scope in scopes for result in screened(screening, state, scope, candidates[scope])]
    likely, sweep = _Chosen(screening, state), Sweep(screening, state, scopes)
    likely.every = every
    first = [result for results in sweep.screened(candidates, likely).values() for result in results]
    last = [result for results in sweep.screened(sweep.postponed).values() for result in results]
    assert len(changing(alone, 1e-3)) > 200
    assert len(first) < len(alone) // 2
    assert changing(alone, 1e-3).items() <= changing([*first, *last], 1e-4).items()
    assert changing([*first, *last], 1e-3).items() <= changing(alone, 1e-4).items()


def test_what_gives_the_same_numbers_makes_the_same_of_its_layers_output(engine: Faulty) -> None:
    """Of all candidates in a layer those that give a fault's numbers are chosen by its layer's output, and few others."""
    case = Case(only(engine, ("gate-up-swapped", {}, (1,))), engine.model, ExplainOptions())
    screening = case.screening(case.entries, Budget(60))
    state, layers = screening.start(), (1,)
    found = screening.reached(state, Candidate(CATALOGUE["gate-up-swapped"], {}, layers))
    assert found is not None
    assert found.first is None
    candidates = [candidate for candidate in screening.candidates(state, layers) if candidate.fault.shows is None]
    alike = Alike(screening, state, found, Likely(screening, state))
    chosen = Sweep(screening, state, [layers]).screened({layers: candidates}, alike)[layers]
    every = screened(screening, state, layers, candidates)
    same = {candidate.fault.name for candidate, (place, _) in every if place is None}
    assert {"gate-up-swapped", "activation-on-wrong-operand"} <= same
    assert {candidate.fault.name for candidate, (place, _) in chosen if place is None} == same
    assert len(chosen) < len(every) // 4


def test_whole_rows_cost_no_more_derivatives_than_some_of_their_elements(
    engine: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where whole rows were recorded, derivatives of a few elements are enough to tell the fault's own change from another one."""
    counts: list[int] = []

    def counted(
        steps: Sequence[Step], point: str, elements: NDArray[np.int64], *others: Any, **options: bool
    ) -> dict[str, Array]:
        counts.append(len(elements))
        return derivatives(steps, point, elements, *others, **options)

    monkeypatch.setattr("parity.explain.search.likely.derivatives", counted)
    dump = engine.dump(Planted((("no-gate", {}, (2,)),)), PROMPT, points="embd,output_norm,logits", size=4096)
    case = Case(dump, engine.model, ExplainOptions())
    screening = case.screening(case.entries, Budget(60))
    state = screening.start()
    assert state.first is not None
    assert case.entries[state.first.point].values.shape[1] == 112
    rows, name = state.first.row + 1, "blk.2.l_out"
    faulty = case.make(plant(case.transformer.steps, CATALOGUE["no-gate"], (2,)), rows).values[name]
    right = case.make(case.transformer.steps, rows).values[name]
    assert Likely(screening, state).among(name, {0: faulty, 1: 2 * right - faulty}, rows) == {0}
    assert counts == [64]


def test_a_shorter_replay_takes_over_what_a_longer_one_has_computed(engine: Faulty) -> None:
    """Up to the first changed step the values are the longer run's own memory, from there on they are computed anew."""
    case = Case(only(engine), engine.model, ExplainOptions())
    right = case.transformer.steps
    steps = plant(right, CATALOGUE["activation"], (2,))
    changed = next(number for number, (step, other) in enumerate(zip(steps, right, strict=True)) if step is not other)
    assert 0 < changed < len(steps)
    alone, shared = case.make(steps, 3), case.make(steps, 3, case.replay)
    for number, step in enumerate(steps):
        own, taken, longer = alone.values[step.makes], shared.values[step.makes], case.replay.values[step.makes]
        assert own.shape == taken.shape, step.makes
        # Fewer rows are another shape of matrix product, which BLAS may add up in another order.
        assert np.abs(own - taken).max() < 1e-5 * np.abs(own).max(), step.makes
        assert np.shares_memory(taken, longer) == (number < changed), step.makes


@pytest.mark.parametrize("name", slow_but(["deepseek32", "rwkv7"], "deepseek32"))
def test_a_shorter_replay_has_the_shapes_of_fewer_rows(
    name: str, small_model: Callable[..., Path], reference: Reference
) -> None:
    """What has a column for each key, or chooses keys, is computed for the fewer rows and not cut from the longer run."""
    model = small_model(name)
    engine = Faulty(model, reference.graph(model)).transformer
    tokens = tokens_of(model, 9, seed=1)
    longer = Replay(engine.steps, tokens, range(9), [0] * 9, engine.weights, engine.backend)
    for rows in (1, 3):
        shorter = tokens[:rows], range(rows), [0] * rows, engine.weights, engine.backend
        alone, shared = Replay(engine.steps, *shorter), Replay(engine.steps, *shorter, longer)
        for step in engine.steps:
            own, taken = alone.values[step.makes], shared.values[step.makes]
            assert own.shape == taken.shape, step.makes
            assert np.allclose(own, taken, rtol=1e-3, atol=1e-5), step.makes


@pytest.mark.parametrize("point", [0, 2, 4])
def test_the_stages_hold_every_candidate_once(engine: Faulty, point: int) -> None:
    """The order of trying only affects the time: nothing is left out and nothing is tried twice."""
    case = Case(only(engine, ("capture-early", {}, None)), engine.model, ExplainOptions())
    screening = case.screening(case.entries, Budget(60))
    state = replace(screening.start(), first=RecordKey(point, 0))
    wanted = [(candidate.fault.name, str(candidate.parameters)) for candidate in screening.candidates(state, None)]
    staged = [
        (candidate.fault.name, str(candidate.parameters)) for stage in stages(screening, state, None) for candidate in stage
    ]
    assert sorted(staged) == sorted(wanted)


def test_a_cause_takes_away_half_of_the_error_that_it_explains(engine: Faulty) -> None:
    """Records brought from just over their limits to just under it are no proof of a fault; those of which half has gone are, under wide
    limits those of which nine tenths have gone at the first place.
    """
    case = Case(only(engine, ("no-gate", {}, (2,))), engine.model, ExplainOptions())
    start = case.screening(case.entries, Budget(60)).start()
    assert start.first is not None
    largest = max(float(errors.max()) for errors in start.nmse)
    for scale, enough, too_little in ((1e-9 / largest, 0.4, 0.9), (1.0, 0.05, 0.4)):
        before = replace(start, nmse=tuple(scale * errors for errors in start.nmse))
        entries = [
            replace(entry, limit=np.maximum(1e-12, 0.95 * errors))
            for entry, errors in zip(case.entries, before.nmse, strict=True)
        ]
        little, much = (
            replace(before, nmse=tuple(part * errors for errors in before.nmse), first=None) for part in (too_little, enough)
        )
        assert mended_share(entries, before, little) is None
        assert mended_share(entries, before, much) == 1.0


@pytest.mark.slow
def test_a_fault_of_later_positions_in_one_unknown_layer(engine: Faulty) -> None:
    """What first shows at a position behind the ones that are computed together is named in its layer, too."""
    tokens = tokens_of(engine.model, 12, seed=4)
    dump = engine.dump(Planted((("keys-cut-off", {"first": 8, "counted": "by the soft max"}, (2,)),)), tokens)
    explanation = explain(dump, engine.model, replace(PATIENT, tokens=tokens))
    assert explanation.first is not None
    assert explanation.first.token_idx == 8
    assert [(cause.named.fault, cause.named.layers) for cause in explanation.causes] == [("keys-cut-off", (2,))]


@pytest.mark.slow
def test_layers_that_cannot_be_carried_on_from_are_screened_at_the_logits(
    reference: Reference, small_model: Callable[..., Path]
) -> None:
    """Experts keep a layer's versions from being carried on; where logits alone were recorded this ended in an internal error."""
    path = small_model("mixtral", layers=3)
    experts, tokens = Faulty(path, reference.graph(path)), tokens_of(path, 4, seed=3)
    dump = experts.dump(Planted((("norm-skipped", {"at": ("ffn_norm",)}, (1,)),)), tokens, points="logits")
    case = Case(dump, experts.model, replace(PATIENT, tokens=tokens))
    screening = case.screening(case.entries, Budget(60))
    state = screening.start()
    scopes: list[Layers] = [(0,), (1,), (2,)]
    candidates = {
        scope: [each for each in screening.candidates(state, scope) if each.fault.name in ("norm-skipped", "no-gate")]
        for scope in scopes
    }
    found = Sweep(screening, state, scopes).screened(candidates, Likely(screening, state))
    right = [each for results in found.values() for each, (place, _) in results if place is None]
    assert ("norm-skipped", (1,)) in [(each.fault.name, each.layers) for each in right]
    assert sum(map(len, found.values())) < sum(map(len, candidates.values()))


def test_a_fault_outside_the_slice_is_judged_by_the_sketch(engine: Faulty) -> None:
    """Where the sketch alone differs, a candidate that moves the recorded slice a little makes no record better, and the fault itself does.

    The slice alone was compared then, so that any small change seemed to explain nearly everything.
    """

    def beyond_the_slice(step: Step) -> Step:
        def run(*inputs: Array, **parameters: Any) -> Array:
            values = np.array(step.op(*inputs, **parameters))
            values[..., 32:64] *= 2
            return values

        return replace(step, op=run) if step.makes == "blk.0.l_out" else step

    dump = engine.dump(Planted(()), PROMPT, bare=False, steps=[beyond_the_slice(step) for step in engine.right])
    case = Case(dump, engine.model, ExplainOptions())
    entry = next(entry for entry in case.entries if entry.point == "blk.0.l_out")
    right = np.asarray(case.replay.values["blk.0.l_out"])
    faulty, moved = right.copy(), right.copy()
    faulty[..., 32:64] *= 2
    moved[..., :16] *= np.float32(1.001)
    assert (entry.base > 1e-2).all()
    assert (entry.nmse(moved, case.positions) > 0.5 * entry.base).all()
    assert (entry.nmse(faulty, case.positions) <= entry.limit).all()


@pytest.mark.slow
def test_early_rows_are_looked_at_in_one_of_the_layers_that_are_alike(engine: Faulty) -> None:
    """A fault that begins to show at position 8 is named without trying in each layer what another one's first rows contradict."""
    fault = CATALOGUE["keys-cut-off"]
    parameters = fault.variants({step.makes: step for step in engine.right})[0]
    planted = Planted(((fault.name, parameters, (2,)),))
    dump = engine.dump(planted, tokens_of(engine.model, 20, seed=1), points="embd,blk.3.l_out,logits")
    answer = explain(dump, engine.model, PATIENT)
    assert [(cause.named.fault, cause.named.layers) for cause in answer.causes] == [(fault.name, (2,))]
    assert answer.variants < 1700  # 1,515; some 500 more where each layer begins with the first row


def test_what_a_fault_leaves_is_its_own_rounding_only_where_rounding_reaches(engine: Faulty) -> None:
    """A thousandth of a large error is no rounding, but where a table of float16 amplifies it: float64 is not asked for nothing."""
    case = Case(only(engine, ("softmax-axis", {"axis": "queries"}, (2,))), engine.model, ExplainOptions())
    screening = case.screening(case.entries, Budget(60))
    state = screening.start()
    assert state.first is not None
    before = float(state.nmse[state.first.point].max())
    assert before > 1e-2
    point = case.entries[state.first.point].point
    assert (screening.all_but_noise(state, 1e-8), screening.all_but_noise(state, 1e-6)) == (True, False)
    screening.coarse = frozenset({point})
    assert screening.all_but_noise(state, 1e-6)
