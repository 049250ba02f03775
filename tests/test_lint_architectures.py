"""lint has no finding in llama.cpp's own dumps, which are those of a right engine."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from changed_files import File
from cli import Cli
from dumps import dump, random
from msgspec.structs import replace

from checkpoints.errors import InputError
from checkpoints.reading.reader import read
from engine.synth.recipes import RECIPES
from parity.lint.lint import lint
from reference.client import Reference
from reference.jobs import DumpJob

TOKENS = (5, 77, 300, 5, 901, 1204)  # one token twice: what stands before attention is the same there
_QUICK = {"phi3"}
# Indices of a sparse attention's choice are no values, and scores after its mask are −∞ in places of their own.
_SPARSE = {"deepseek32", "glm-dsa"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in RECIPES if name not in _SPARSE],
)
def test_no_finding(reference: Reference, small_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """All points, two generated tokens where the model generates any, with the model file and without, and as bare lines."""
    model, out = small_model(name), tmp_path / "ref.jsonl"
    try:
        reference.dump(DumpJob(model, out, TOKENS, points="all", generate=2))
    except InputError as error:
        assert "Leave --generate out" in error.advice  # noqa: PT017 - what else it refuses is a failure
        reference.dump(DumpJob(model, out, TOKENS, points="all"))
    whole = read(out)
    bare = {point: replace(rows, stats={}, sketch=None) for point, rows in whole.points.items()}
    for written in (whole, replace(whole, header=None, points=bare)):
        for known in (model, None):
            assert [(finding.rule, finding.evidence) for finding in lint(written, known).findings] == []


@pytest.mark.parametrize("own", [False, True], ids=["no keys of its own", "keys of its own"])
@pytest.mark.parametrize("read", [True, False], ids=["caches recorded", "attention's result only"])
def test_a_layer_without_keys_and_values_reads_another_layers(own: bool, read: bool) -> None:
    """Bare lines of a model whose last layer has no keys and values: what it reads is layer 1's. Where it has its own, that is stale."""
    kinds = ("q", "k", "v", "kqv_out", "l_out") + ("k_read", "v_read") * read
    arrays = random(("embd", *(f"blk.{layer}.{kind}" for layer in range(4) for kind in kinds)), positions=5)
    for kind in ("k_read", "v_read") * read:
        arrays[f"blk.3.{kind}"] = arrays[f"blk.1.{kind}"]
    arrays["blk.3.kqv_out"][0] = arrays["blk.1.kqv_out"][0]  # over one position: its value
    if not own:
        del arrays["blk.3.k"], arrays["blk.3.v"]
    lines = replace(dump(arrays, header=None), end=None)
    assert {finding.rule for finding in lint(lines).findings} == ({"same-vector"} if own else set())


@pytest.mark.parametrize("stale", [False, True])
def test_a_value_of_the_token_alone_is_the_same_at_equal_tokens(stale: bool) -> None:
    """Bare lines of a node that a later layer makes from the embedding: it follows the tokens. A row of another token's is stale."""
    arrays = random(("embd", "blk.1.l_out", "blk.2.l_out"), positions=6)
    arrays["embd"][[3, 5]] = arrays["embd"][[0, 1]]
    arrays["blk.2.embd_skip"] = arrays["embd"] * np.float32(3)
    if stale:
        arrays["blk.2.embd_skip"][4] = arrays["blk.2.embd_skip"][3]
    lines = replace(dump(arrays, header=None), end=None)
    assert {finding.rule for finding in lint(lines).findings} == ({"stale-position"} if stale else set())


@pytest.mark.parametrize(("name", "suspected"), [("scale.2", False), ("blk.1.scale", True), ("blk.1.l_out", True)])
def test_distances_rise_in_even_steps(name: str, suspected: bool) -> None:
    """Bare lines of a node of no layer, such as a decay by distance, may be even steps; a layer's values are not."""
    arrays = random(("embd", "blk.0.l_out", "blk.1.l_out"), positions=4)
    arrays[name] = np.linspace(-2.25, 3.0, 64, dtype=np.float32) * np.arange(1, 5, dtype=np.float32)[:, None]
    lines = replace(dump(arrays, header=None), end=None)
    assert ("flat-row" in {finding.rule for finding in lint(lines).findings}) == suspected


def test_a_sketch_of_values_near_the_largest_is_infinite() -> None:
    """Logits that a model hides are -3.4e38: sums of several are beyond float32, in the sketch as in what it is compared with."""
    arrays = random(("embd", "blk.0.l_out", "logits"), positions=3)
    arrays["logits"][0, :40] = np.finfo(np.float32).min
    whole = replace(dump(arrays, slice_size=None), end=None)
    sketch = whole.points["logits"].sketch
    assert sketch is not None
    assert np.isinf(sketch[0]).any()
    assert "statistics" not in {finding.rule for finding in lint(whole).findings}


@pytest.mark.parametrize(("widths", "suspected"), [((256, 256), False), ((256, 192), True), ((320, 320), True)])
def test_layers_may_pass_on_several_streams(widths: tuple[int, int], suspected: bool) -> None:
    """Bare lines whose layers' outputs are four times as long as other rows are of a model with four streams; outputs of different lengths,
    or as long as all five positions together, are not.
    """
    arrays = random(("embd", "blk.0.attn_norm", "blk.1.attn_norm", "output_norm"), positions=5)
    for layer, width in enumerate(widths):
        arrays[f"blk.{layer}.l_out"] = np.random.default_rng(layer).standard_normal((5, width), dtype=np.float32)
    lines = replace(dump(arrays, header=None), end=None)
    assert {finding.rule for finding in lint(lines).findings} == ({"shape"} if suspected else set())


def test_parts_of_one_product_are_not_alike(reference: Reference, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """Two parts of a fused product are views of one value: a record that shows the first as the second is a finding."""
    out = tmp_path / "ref.jsonl"
    reference.dump(DumpJob(small_model("phi3"), out, TOKENS, points="all"))
    right = read(out)
    gate = replace(right.points["blk.0.ffn_gate"], point="blk.0.ffn_up")
    kept = replace(right, points={**right.points, "blk.0.ffn_up": gate})
    assert "same-vector" in {finding.rule for finding in lint(kept).findings}


def test_one_token_repeated_has_one_score_where_nothing_is_rotated(
    reference: Reference, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """SmolLM3's layers without RoPE give each of five equal tokens the same weight; among other tokens that is a finding."""
    out = tmp_path / "ref.jsonl"
    reference.dump(DumpJob(small_model("smollm3"), out, (50,) * 5, points="all"))
    same = read(out)
    assert lint(same).findings == ()
    others = replace(same, header=replace(same.header, tokens=(50, 51, 52, 53, 54)))
    assert "attention-rows" in {finding.rule for finding in lint(others).findings}


@pytest.mark.slow
def test_a_mask_of_chosen_keys_is_clean(reference: Reference, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """What an index did not choose is −∞ in the midst of a row that is 0 elsewhere, once the prompt is longer than the choice."""
    out = tmp_path / "ref.jsonl"
    reference.dump(DumpJob(small_model("hy_v4"), out, tuple(range(5, 18)), points="all"))
    assert lint(read(out)).findings == ()


def test_a_window_of_repeated_tokens_is_clean(parity: Cli, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """Where attention's window holds the same tokens, so do the rows that are made of it."""
    model = small_model("gpt-oss", layers=2, settings={"attention.sliding_window": 3})
    out = tmp_path / "ref.jsonl"
    assert parity("dump", "ref", "--model", model, "--tokens", "9,8,7,7,7,7,7,6", "--points", "all", "-o", out).code == 0
    assert parity("lint", out, "--model", model).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("side", ["ref", "ours"])
def test_a_window_of_one_position_is_clean(parity: Cli, small_model: Callable[..., Path], tmp_path: Path, side: str) -> None:
    """Where each position sees itself only, equal tokens have equal rows, with the model file and without; rows of other tokens
    are still suspected, and so are these if the window is larger.
    """
    model = small_model("gemma3", layers=2, settings={"attention.sliding_window": 1})
    out = tmp_path / "dump.jsonl"
    assert parity("dump", side, "--model", model, "--tokens", "5,6,7,5,8,5", "--points", "all", "-o", out).code == 0
    assert parity("lint", out, "--model", model).code == 0
    assert parity("lint", out).code == 0
    dump = read(out)
    assert dump.header is not None
    wider = replace(dump, header=replace(dump.header, hparams={"attention_window": 2}))
    assert "stale-position" in {finding.rule for finding in lint(wider).findings}
    rows = dump.points["blk.0.kqv_out"]
    values = rows.values.copy()
    values[rows.token_idx == 2] = values[rows.token_idx == 1]
    stale = replace(dump, points={**dump.points, "blk.0.kqv_out": replace(rows, values=values)})
    for known in (model, None):
        assert "stale-position" in {finding.rule for finding in lint(stale, known).findings}


@pytest.mark.slow
def test_ids_of_experts_are_no_vectors(parity: Cli, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """Four of five experts are the same at many positions and in many layers, and an engine may write them as numbers."""
    model = small_model("qwen2moe", layers=2, settings={"expert_count": 5, "expert_used_count": 4})
    out = tmp_path / "ours.jsonl"
    tokens = ",".join(str(20 + 7 * i) for i in range(16))
    assert parity("dump", "ours", "--model", model, "--tokens", tokens, "--points", "all", "-o", out).code == 0
    assert parity("lint", out, "--model", model).code == 0


def test_last_layers_that_add_little_are_no_late_capture(parity: Cli, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """Outputs of nearly the same direction as the last one's, which is recorded as another vector, were captured in time."""
    file = File(small_model("qwen3", "f32", layers=3))
    for name in ("attn_output.weight", "ffn_down.weight"):
        for layer in (1, 2):
            file.tensors[f"blk.{layer}.{name}"] *= 1e-4
    model, out = file.write(tmp_path / "model.gguf"), tmp_path / "dump.jsonl"
    assert parity("dump", "ref", "--model", model, "--tokens", "5,6,7,8", "--points", "all", "-o", out).code == 0
    assert parity("lint", out, "--model", model).code == 0
    dump = read(out)
    late = replace(dump, points={**dump.points, "blk.0.l_out": replace(dump.points["blk.2.l_out"], point="blk.0.l_out")})
    assert "captured-late" in {finding.rule for finding in lint(late, model).findings}


def test_a_bias_by_distance_may_be_flat(parity: Cli, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """Beyond the largest distance, all positions have one bucket of T5's relative bias."""
    out = tmp_path / "ref.jsonl"
    model = small_model("t5encoder", layers=1, settings={"attention.relative_buckets_count": 8})
    tokens = ",".join(str(20 + 7 * i) for i in range(150))
    assert parity("dump", "ref", "--model", model, "--tokens", tokens, "--points", "blk.0.{kq_b,l_out}", "-o", out).code == 0
    assert lint(read(out)).findings == ()


@pytest.mark.parametrize(("weight", "suspected"), [(1.0, False), (0.9, True)])
def test_a_head_that_sees_one_position_has_its_value(weight: float, suspected: bool) -> None:
    """Scores that are not scaled make weights of 1: the first head's values are then the same at several positions, in a right engine."""
    arrays = random(("embd", "blk.1.kqv", "blk.1.kqv_out", "blk.1.l_out"), positions=5)
    heads = np.zeros((5, 5, 5), dtype=np.float32)  # heads, positions, positions seen
    heads[:, :, 0] = 1
    heads[0, 2:4, :2] = (weight, 1 - weight)
    for name in ("blk.1.kqv", "blk.1.kqv_out"):
        arrays[name][2:4, :16] = arrays[name][2, :16]  # the other heads differ
    whole = dump(arrays | {"blk.1.kq_soft_max": heads})
    assert ("stale-position" in {finding.rule for finding in lint(whole).findings}) == suspected


@pytest.mark.parametrize("same", [True, False], ids=["all heads on one key", "only the recorded head"])
def test_what_follows_attention_on_one_key_repeats_like_it(same: bool) -> None:
    """Where all heads hang on one key, the output projection repeats; where the row behind the slice differs, it is stale."""
    arrays = random(("embd", "blk.1.kqv_out", "blk.1.attn_out", "blk.1.l_out"), positions=5)
    heads = np.zeros((5, 5, 5), dtype=np.float32)
    heads[:, :, 0] = 1
    for name, width in (("blk.1.kqv_out", None if same else 16), ("blk.1.attn_out", None)):
        arrays[name][3, :width] = arrays[name][2, :width]
    findings = lint(dump(arrays | {"blk.1.kq_soft_max": heads})).findings
    assert {finding.checkpoint for finding in findings if finding.rule == "stale-position"} == (
        set() if same else {"blk.1.attn_out"}
    )


def test_ids_of_experts_that_are_written_as_numbers_are_no_ramp() -> None:
    """Eight experts in ascending order are no row in even steps; half of a ramp's numbers are none."""
    arrays = random(("embd", "blk.1.l_out"), positions=3)
    ids = np.tile(np.arange(1, 9, dtype=np.float32), (3, 1))
    for factor, rules in ((1.0, set()), (0.5, {"flat-row", "stale-position"})):
        findings = lint(dump(arrays | {"blk.1.ffn_moe_chosen": ids * np.float32(factor)})).findings
        assert {finding.rule for finding in findings if finding.checkpoint == "blk.1.ffn_moe_chosen"} == rules
