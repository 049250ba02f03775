"""A fault is planted or says that it does not apply; any other exception out of one is a bug that becomes visible."""

import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explaining import only, small_engine
from msgspec.structs import replace
from planted import Faulty
from slow import slow_but

from checkpoints.gguf_file import contents, header_bytes
from checkpoints.long_factors import LONG, SHORT
from engine import ops
from engine.backend import choose
from engine.faults import CATALOGUE, FITTED, Fault, Planting, plant
from engine.faults.base import layer_near
from engine.faults.edits import Then
from engine.graph import Step
from engine.inapplicable import NotApplicable
from engine.opened import open_plain
from engine.replay.replay import Replay
from engine.synth import Shape, synthesize
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.explain.explain import explain
from reference.client import Reference

# Head counts and widths that do not divide each other, one layer only, no biases, frequency factors, block formats.
MODELS = {
    "odd": (Shape("llama", 2, 60, 5, 1, 0, 36, 33, biases=False), "f32"),
    "one layer": (Shape("llama", 1, 64, 1, 1, 0, 48, 50, biases=False), "bf16"),
    "factors": (Shape("llama", 2, 96, 4, 2, 32, 160, 90, biases=False, rope_factors=True, rope_scaling=4.0), "f16"),
    "blocks": (Shape("qwen2", 2, 128, 4, 2, 0, 96, 90), "q4_1"),
}
Chosen = tuple[Fault, Mapping[str, Any]]


def _run(right: Replay, steps: list[Step], chosen: tuple[Chosen, ...], layers: tuple[int, ...] | None) -> bool:
    """Whether these faults, one on the other, apply."""
    try:
        for fault, parameters in chosen:
            steps = Planting(steps).of(fault, layers, parameters)
        right.run(steps, lambda _name, _value: True)
    except NotApplicable:
        return False
    return True


@pytest.mark.parametrize("name", slow_but(MODELS, *(name for name in MODELS if name not in ("factors", "blocks", "odd"))))
def test_faults_apply_or_say_that_they_do_not(name: str, tmp_path: Path) -> None:
    """Every variant of the catalogue alone, and 300 seeded pairs of them, in all layers and in the first one alone."""
    shape, kind = MODELS[name]
    synthesize(tmp_path / "model.gguf", shape, weight_type=kind, seed=3)
    engine = Transformer(GgufModel(tmp_path / "model.gguf"), choose("numpy"))
    tokens = [*((7 * i + 3) % shape.vocab for i in range(8)), shape.vocab - 1]  # the last id has no next one
    right = Replay(engine.steps, tokens, range(9), [0] * 6 + [1, 2, 3], engine.weights, engine.backend)
    steps = list(engine.steps)
    every = [(fault, chosen) for fault in CATALOGUE.values() for chosen in fault.variants(Planting(steps).right)]
    draw = random.Random(4)
    for layers in (None, (0,)):
        assert sum(_run(right, steps, (variant,), layers) for variant in every) > len(every) // 3
        assert sum(_run(right, steps, (draw.choice(every), draw.choice(every)), layers) for _ in range(150)) > 10


def test_a_value_layout_is_not_changed_twice(tmp_path: Path) -> None:
    """Below another fault of the same operation, too: the second one would read the cache without the passes that the first needs."""
    shape, kind = MODELS["one layer"]
    synthesize(tmp_path / "model.gguf", shape, weight_type=kind, seed=3)
    engine = Transformer(GgufModel(tmp_path / "model.gguf"), choose("numpy"))
    fault = CATALOGUE["v-layout"]
    once = Planting(list(engine.steps)).of(fault, None, {"layout": "transposed"})
    again = [replace(step, op=Then(step.op, np.negative)) if step.makes.endswith("kqv_out") else step for step in once]
    with pytest.raises(NotApplicable, match="already"):
        Planting(again).of(fault, None, {"layout": "head by head"})


def test_a_value_layout_does_not_apply_to_attention_of_other_head_counts(tmp_path: Path) -> None:
    """Below another number of heads, attention reads queries and keys as well, which were taken for weights: an IndexError."""
    synthesize(tmp_path / "model.gguf", Shape("llama", 1, 64, 4, 2, 0, 48, 50, biases=False), weight_type="f32", seed=3)
    engine = Transformer(GgufModel(tmp_path / "model.gguf"), choose("numpy"))
    right = Replay(engine.steps, range(4), range(4), [0] * 4, engine.weights, engine.backend)
    counts, layout = CATALOGUE["head-count"], CATALOGUE["v-layout"]
    planting = Planting(list(engine.steps)).right
    below = [(counts, chosen) for chosen in counts.variants(planting)]
    assert any(_run(right, list(engine.steps), (chosen,), None) for chosen in below)
    for first in below:
        for chosen in layout.variants(planting):
            assert not _run(right, list(engine.steps), (first, (layout, chosen)), None)


def test_a_rotation_halved_until_no_pair_is_left_does_not_apply(tmp_path: Path) -> None:
    """Of four rotated dimensions, half of the half and a quarter are no pair; neither is a rotation of 0 that another cause plants.

    Twice the half is the whole head, which is a variant of its own: the answer named both, and that nothing tells them apart.
    """
    shape = Shape("llama", 2, 32, 8, 2, 4, 36, 33, biases=False)
    synthesize(tmp_path / "model.gguf", shape, weight_type="f32", seed=3)
    engine = Transformer(GgufModel(tmp_path / "model.gguf"), choose("numpy"))
    right = Replay(engine.steps, range(4), range(4), [0] * 4, engine.weights, engine.backend)
    dims, at = CATALOGUE["rope-dims"], {"at": ("q_rope", "k_rope")}
    half, quarter, twice = ({"of": share} | at for share in (0.5, 0.25, 2.0))
    assert _run(right, list(engine.steps), ((dims, half),), None)
    assert not _run(right, list(engine.steps), ((dims, half), (dims, twice)), None)
    assert not _run(right, list(engine.steps), ((dims, half), (dims, half)), None)
    assert not _run(right, list(engine.steps), ((dims, quarter),), None)
    none = [replace(step, params={**step.params, "dims": 0}) if step.op is ops.rope else step for step in engine.steps]
    with pytest.raises(NotApplicable, match="hold none"):
        right.run(none, lambda _name, _value: True)


def test_a_bug_in_a_fault_is_no_fault_that_does_not_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that looks up a step by a wrong name ends the search with its KeyError."""
    engine = small_engine(tmp_path)

    def change(_step: Step, right: Mapping[str, Step], _parameters: Mapping[str, Any]) -> Step:
        return right["blk.0.no_such_point"]

    first = next(iter(CATALOGUE.values()))
    broken = replace(first, name="broken", kinds=("attn_norm",), change=change, parameters={}, once=False)
    monkeypatch.setitem(CATALOGUE, "broken", broken)  # type: ignore[arg-type]  # a bug of ours: the catalogue has none
    with pytest.raises(KeyError, match="no_such_point"):
        explain(only(engine, ("activation", {"activation": "ReLU"}, (2,))), engine.model)
    with pytest.raises(NotApplicable):
        plant(engine.right, CATALOGUE["rope-base"], (), base=1.0)


def test_a_mask_is_not_changed_twice(tmp_path: Path) -> None:
    """The second change would hand the passes that the first one reads to attention's sinks."""
    engine = small_engine(tmp_path)
    once = Planting(engine.right).of(CATALOGUE["no-causal-mask"], None, {})
    with pytest.raises(NotApplicable, match="another mask already"):
        Planting(once).of(CATALOGUE["mask-by-product"], None, {"masked": CATALOGUE["mask-by-product"].parameters["masked"][0]})


def test_a_change_of_a_changed_operation_takes_what_that_takes(tmp_path: Path) -> None:
    """A bias left out, twice: the operation around a copy of its input has no place for a bias, and says so before it is computed."""
    engine = small_engine(tmp_path)
    copy = replace(next(step for step in engine.right if step.makes == "blk.1.q"), op=ops.part, weights=())
    steps = [copy if step.makes == copy.makes else step for step in engine.right]
    added = next(fit.fault for fit in FITTED if fit.fault.name == "constant-added")
    shifted = plant(steps, added, (1,), by=0.1, part="the result", at=("q",))
    with pytest.raises(NotApplicable):
        Planting(shifted).edits(replace(CATALOGUE["no-qkv-bias"], change=_two_weights), (1,), {"at": ("q",)})


def test_a_norm_whose_weight_was_taken_away_lends_none(tmp_path: Path) -> None:
    """A fault that reads the weight of a norm that another fault left without one says that it does not apply."""
    engine = small_engine(tmp_path)
    bare = [replace(step, weights=()) if step.makes == "blk.1.ffn_norm" else step for step in engine.right]
    for fault, parameters in (
        ("norms-exchanged", {"at": ("attn_norm",)}),
        ("norm-of-other", {"norm": ("attn_norm", "ffn_norm")}),
    ):
        with pytest.raises(NotApplicable):
            plant(bare, CATALOGUE[fault], (1,), **parameters)


def _two_weights(step: Step, _right: Mapping[str, Step], _parameters: Mapping[str, Any]) -> Step:
    return replace(step, weights=(None, None))


def test_a_norm_that_was_left_out_has_no_weight_to_lend(small_model: Callable[..., Path], reference: Reference) -> None:
    """Norms of heads left out, then their weights exchanged: the second does not apply, since there is neither norm nor weight."""
    model = small_model("qwen3", layers=1)
    engine = Transformer(GgufModel(model), choose("numpy"), recorded=reference.graph(model))
    right = Replay(engine.steps, range(4), range(4), [0] * 4, engine.weights, engine.backend)
    both = {"at": ("q_norm", "k_norm")}
    chosen = ((CATALOGUE["head-norm-missing"], both), (CATALOGUE["norms-exchanged"], both))
    assert _run(right, list(engine.steps), chosen[:1], None)
    assert not _run(right, list(engine.steps), chosen, None)


@pytest.mark.parametrize("lacking", [SHORT, LONG])
def test_factors_of_one_length_have_no_others(
    lacking: str, small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """A file with one of the two sets of frequency factors, which llama.cpp takes, has no fault of the other set."""
    settings = {"rope.scaling.original_context_length": 4096 if lacking == LONG else 256}
    whole = contents(small_model("phi3-longrope", layers=1, context=8192, settings=settings))
    infos, data = [], b""
    for tensor, after in zip(whole.tensors, [*(tensor.offset for tensor in whole.tensors[1:]), None], strict=True):
        if tensor.name != lacking:
            infos.append(replace(tensor, offset=len(data)))
            data += whole.path.read_bytes()[whole.data :][tensor.offset : after]
    path = tmp_path / "model.gguf"
    path.write_bytes(header_bytes(whole.metadata, infos) + data)
    engine = Transformer(GgufModel(path), choose("numpy"), recorded=reference.graph(path))
    right = Replay(engine.steps, [1, 2, 3], range(3), [0] * 3, engine.weights, engine.backend)
    steps = plant(engine.steps, CATALOGUE["rope-factors-of-other-length"])
    with pytest.raises(NotApplicable, match=f"the file has no {lacking}"):
        right.run(steps, lambda _name, _value: True)


@pytest.mark.slow
def test_positions_moved_beyond_their_table_do_not_apply(small_model: Callable[..., Path], reference: Reference) -> None:
    """A prompt that fills the context: its last position has no next row, while one row back is there for every position."""
    model = small_model("gpt2", layers=1, context=8)
    engine = open_plain(GgufModel(model), "numpy", recorded=partial(reference.graph, model))
    engine.expect(8)
    right = Replay(engine.steps, [5] * 8, range(8), [0] * 8, engine.weights, engine.backend)
    fault = CATALOGUE["position-rows"]
    assert _run(right, list(engine.steps), ((fault, {"by": "minus one row"}),), None)
    assert not _run(right, list(engine.steps), ((fault, {"by": "one row"}),), None)


@pytest.mark.parametrize(
    "name", ["norm-weight-missing", "norm-one-plus-weight", "eps-outside-root", "norm-sum", "norm-in-halves"]
)
def test_a_layer_norm_with_a_fault_is_one_of_the_row_without_its_mean(name: str) -> None:
    """The same faults as of an RMS norm, by a formula of their own in float64: the mean is subtracted, and the bias added, all the same."""
    rng = np.random.default_rng(4)
    x, weight, bias = rng.standard_normal((3, 8)) + 1, rng.standard_normal(8), rng.standard_normal(8)
    step = Step("blk.0.attn_norm", ops.layer_norm, ("embd",), ("w", "b"), {"eps": 0.1})
    changed = CATALOGUE[name].change(step, {}, {})
    assert isinstance(changed, Step)
    given = [part.astype(np.float32) for part in (x, weight, bias)]
    centred = x - x.mean(axis=1, keepdims=True)
    squares = centred**2
    roots = {
        "eps-outside-root": np.sqrt(squares.mean(axis=1, keepdims=True)) + 0.1,
        "norm-sum": np.sqrt(squares.sum(axis=1, keepdims=True) + 0.1),
        "norm-in-halves": np.repeat(np.sqrt(squares.reshape(3, 2, 4).mean(axis=2) + 0.1), 4, axis=1),
    }
    factor = {"norm-weight-missing": np.ones(8), "norm-one-plus-weight": 1 + weight}.get(name, weight)
    wanted = centred / roots.get(name, np.sqrt(squares.mean(axis=1, keepdims=True) + 0.1)) * factor + bias
    assert np.abs(changed.op(*given, **changed.params) - wanted).max() < 1e-5
    with pytest.raises(NotApplicable):
        CATALOGUE["layer-norm"].change(step, {}, {})


def test_norms_of_heads_have_whatever_name_a_model_gives_them() -> None:
    """Hunyuan's norms stand after RoPE under ggml's own names: the entries of such norms have variants there."""
    step = Step("blk.0.Kcur_norm", ops.rms_norm, ("blk.0.k_rope",), ("w",), {"eps": 1e-6, "heads": 2})
    names = ("head-norm-missing", "head-norm-whole-width", "post-norm-one-plus-weight", "norm-weight-missing")
    fitted = next(fit for fit in FITTED if fit.fault.name == "head-norm-epsilon")
    for variants in (*(CATALOGUE[name].variants({step.makes: step}) for name in names), fitted.variants({step.makes: step})):
        assert ("Kcur_norm",) in [variant["at"] for variant in variants]


def test_sinks_of_ggmls_own_soft_max(reference: Reference, small_model: Callable[..., Path]) -> None:
    """hy_v4's sparse attention is ggml's own soft max, of which the sinks are an operand: without them, and with sinks of zero, its
    weights are others.
    """
    path = small_model("hy_v4", layers=1)
    engine = open_plain(GgufModel(path), "numpy", recorded=partial(reference.graph, path))
    right = Replay(engine.steps, range(5, 9), range(4), [0] * 4, engine.weights, engine.backend)
    sums = []
    for parameters in CATALOGUE["sinks-missing"].variants(Planting(list(engine.steps)).right):
        steps = Planting(list(engine.steps)).of(CATALOGUE["sinks-missing"], None, parameters)
        right.run(steps, lambda name, value: sums.append(float(value.sum())) if name == "blk.0.kq_soft_max" else None)
    assert sums[0] == pytest.approx(4 * 4)  # four positions, four heads, and no weight left for a sink
    assert sums[1] < sums[0]


@pytest.mark.parametrize(
    ("recipe", "fault", "parameters", "changed"),
    [
        ("gpt-oss", "window-pattern", {"pattern": (3, "last")}, ".q_rope .k_rope .kq_soft_max"),
        ("deepseek2", "keys-cut-off", {"first": 8, "counted": "by the soft max"}, ".kq_soft_max"),
        ("mpt", "keys-cut-off", {"first": 8, "counted": "by the soft max"}, ".kq_soft_max"),
    ],
)
def test_attention_in_ggmls_own_operations_is_changed_where_it_can_be(
    reference: Reference, small_model: Callable[..., Path], recipe: str, fault: str, parameters: dict[str, Any], changed: str
) -> None:
    """A RoPE of ggml's own, a sum of values that is another operation, or linear biases are no reason that a fault of soft max or window
    does not apply.
    """
    path = small_model(recipe)
    steps = list(open_plain(GgufModel(path), "numpy", recorded=partial(reference.graph, path)).steps)
    edits = Planting(steps).edits(CATALOGUE[fault], None, parameters)
    assert edits
    assert all(steps[number].makes.endswith(tuple(changed.split())) for number in edits)


@pytest.mark.parametrize(
    ("recipe", "fault", "layers", "other"),
    [
        pytest.param("qwen3next", "decay-missing", {0, 1, 2}, 3, marks=pytest.mark.slow),
        ("llama4", "rope-on-values", {0, 1, 2}, 3),
    ],
)
def test_a_fault_in_all_layers_is_one_in_those_that_have_its_place(
    reference: Reference, small_model: Callable[..., Path], recipe: str, fault: str, layers: set[int], other: int
) -> None:
    """A recurrence's fault is tried in a model that has attention layers, too, RoPE's where some layers have none; the layer without its
    place, asked for alone, still says so.
    """
    path = small_model(recipe)
    planting = Planting(open_plain(GgufModel(path), "numpy", recorded=partial(reference.graph, path)).steps)
    parameters = CATALOGUE[fault].variants(planting.right)[0]
    edits = planting.edits(CATALOGUE[fault], None, parameters)
    assert {layer_near(planting.steps[number]) for number in edits} == layers
    assert planting.changes_by(CATALOGUE[fault], parameters, min(edits))
    assert not planting.changes_by(CATALOGUE[fault], parameters, min(edits) - 1)
    with pytest.raises(NotApplicable):
        planting.edits(CATALOGUE[fault], (other,), parameters)


def test_variants_that_differ_in_other_steps_change_a_step_once(tmp_path: Path) -> None:
    """A fault at attn_norm alone and at both norms puts the same step there, but for one that asks for its places: their names differ."""
    planting = Planting(small_engine(tmp_path).right)
    for name, parameters, shared in (("norm-twice", {}, True), ("norms-exchanged", {}, False)):
        fault = CATALOGUE[name]
        both, one = (
            planting.edits(fault, (0,), {**parameters, "at": at}) for at in (("attn_norm", "ffn_norm"), ("attn_norm",))
        )
        assert (both[min(both)] is one[min(one)]) is shared


@pytest.mark.parametrize("layers", [None, (0, 1, 2), (1, 3)])
def test_a_range_of_layers_may_have_a_hole(tmp_path: Path, layers: tuple[int, ...] | None) -> None:
    """A fault of several layers is planted in those that have its place; in one that has none it is refused."""
    right = [
        replace(step, op=ops.layer_norm) if step.makes == "blk.1.ffn_norm" else step for step in small_engine(tmp_path).right
    ]
    planting, fault = Planting(right), CATALOGUE["norms-exchanged"]
    parameters = {"at": ("attn_norm", "ffn_norm")}
    changed = {right[number].makes for number in planting.edits(fault, layers, parameters)}
    wanted = [layer for layer in (layers or range(4)) if layer != 1]
    assert changed == {f"blk.{layer}.{kind}" for layer in wanted for kind in parameters["at"]}
    with pytest.raises(NotApplicable):
        planting.edits(fault, (1,), parameters)


def test_no_entry_has_a_variant_twice(small_model: Callable[..., Path], reference: Reference) -> None:
    """Falcon has one residual sum a layer: all of a model's sums and that one alone are one variant, tried once."""
    model = small_model("falcon")
    right = Planting(Faulty(model, reference.graph(model)).right).right
    for fault in CATALOGUE.values():
        variants = [sorted(chosen.items()) for chosen in fault.variants(right)]
        assert [chosen for number, chosen in enumerate(variants) if chosen in variants[:number]] == [], fault.name
