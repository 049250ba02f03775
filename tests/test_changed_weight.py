"""A weight that a wrong file or loader changed is named by what is wrong with it, from the records of its operation alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from changed_files import File
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, tokens_of

from checkpoints.graph import RecordedGraph
from engine.graph import Step, WeightPart
from engine.synth import Shape, synthesize
from parity.explain.explain import explain
from parity.explain.findings.column_range import column_range
from parity.explain.findings.weight_changes import BF16, F16, F32, changes
from reference.client import Reference

Change = Callable[[np.ndarray], np.ndarray]
SHAPE = Shape("qwen2", layers=2, width=64, heads=4, kv_heads=2, ff=128, vocab=120)


def _scaled(row: int | slice, columns: slice, factor: float) -> Change:
    def change(weight: np.ndarray) -> np.ndarray:
        weight[row, columns] *= np.float32(factor)
        return weight

    return change


def _expert(place: int, other: int) -> Change:
    def change(weight: np.ndarray) -> np.ndarray:
        weight[place] = weight[other]
        return weight

    return change


def _tap(number: int, factor: float) -> Change:
    def change(weight: np.ndarray) -> np.ndarray:
        weight[:, number] *= np.float32(factor)
        return weight

    return change


def _quarters(order: Sequence[int]) -> Change:
    return lambda weight: np.concatenate([np.split(weight, 4, axis=-1)[number] for number in order], axis=-1)


def _rolled(by: int) -> Change:
    return lambda weight: np.roll(weight.reshape(-1), by).reshape(weight.shape)


def _law(model: Path, weight: str, change: Change, folder: Path, recorded: RecordedGraph | None = None) -> str:
    """The law at the first difference of an engine whose file has this weight changed: sixteen values of each point."""
    file = File(model)
    file.tensors[weight][...] = change(file.tensors[weight].copy())
    changed = file.write(folder / "changed.gguf")
    tokens = tokens_of(model, 12, seed=7)
    dump = Faulty(changed, recorded).dump(Planted(()), tokens, points="all")
    answer = explain(replace(dump, header=None), model, replace(PATIENT, tokens=tokens))
    assert not answer.causes
    return answer.law


@pytest.mark.parametrize(
    ("weight", "change", "law"),
    [
        ("ffn_down.weight", _scaled(3, slice(32, 64), 0.0), "elements 32 to 63 of row 3 are zeros"),
        ("ffn_down.weight", _quarters((0, 2, 1, 3)), "the quarters of each row stand in the order 0, 2, 1, 3"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("ffn_down.weight", _scaled(3, slice(32, 64), 2.0), "elements 32 to 63 of row 3 are 2 times the right ones"),
                (
                    "ffn_down.weight",
                    _scaled(slice(None), slice(0, 32), 0.0),
                    "elements 0 to 31 of each of the 16 rows that were recorded are zeros "
                    "(or those of blk.1.ffn_swiglu as it is read here)",
                ),
                ("ffn_down.weight", _rolled(1), "read from 1 element too early"),
                ("attn_q.weight", _rolled(-8), "read from 8 elements too late"),
                ("attn_q.bias", _rolled(32), "the halves are exchanged (16 of 64 elements recorded)"),
                ("attn_norm.weight", _rolled(-1), "read from 1 element too late"),
            )
        ),
    ],
)
def test_a_changed_weight_is_named(weight: str, change: Change, law: str, tmp_path: Path) -> None:
    """Blocks that are zeros or doubled, shards in another order, data read from elsewhere: one sentence with the weight's name."""
    model = tmp_path / "model.gguf"
    synthesize(model, SHAPE, weight_type="f32", seed=3)
    assert _law(model, f"blk.1.{weight}", change, tmp_path) == f"blk.1.{weight}: {law}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "weight", "change", "law"),
    [
        ("qwen3moe", "blk.1.ffn_down_exps.weight", _expert(5, 2), "expert 2's matrix stands in expert 5's place"),
        ("olmoe", "blk.1.ffn_gate_exps.weight", _expert(3, 1), "expert 1's matrix stands in expert 3's place"),
        ("lfm2", "blk.0.shortconv.conv.weight", _tap(1, 2.0), "tap 1 is 2 times the right one"),
        ("mamba", "blk.1.ssm_conv1d.weight", _tap(2, 0.0), "tap 2 is all zeros"),
        ("gpt-oss", "blk.1.attn_sinks.weight", lambda sinks: sinks[[1, 0, 2, 3]], "elements 0 and 1 are exchanged"),
    ],
)
def test_experts_taps_and_sinks(
    recipe: str,
    weight: str,
    change: Change,
    law: str,
    small_model: Callable[..., Path],
    reference: Reference,
    tmp_path: Path,
) -> None:
    """One expert's matrix in another one's place, a wrong tap of a convolution, sinks of other heads."""
    model = small_model(recipe, kind="f32")
    assert _law(model, weight, change, tmp_path, reference.graph(model)) == f"{weight}: {law}"


@pytest.mark.parametrize("shape", [(64, 96), (8, 64, 96), (96, 4), (48,)])
@pytest.mark.parametrize("kind", [F32, F16, BF16])
def test_changes_are_of_the_weights_shape_and_of_no_other_numbers(shape: tuple[int, ...], kind: int) -> None:
    """Each change gives another weight of the same shape, and no two of a weight give the same one."""
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float16).astype(np.float32)
    weight = (weight.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # exact in BF16, too
    seen = {weight.tobytes()}
    with np.errstate(all="ignore"):
        for changed in changes(shape, kind):
            made = np.ascontiguousarray(changed.change(weight))
            assert (made.shape, made.dtype) == (shape, np.float32), changed.sentence
            assert made.tobytes() not in seen, changed.sentence
            seen.add(made.tobytes())


def test_a_range_of_columns_is_none_where_the_error_is_noise() -> None:
    """Errors that no range accounts for have none; those of a range have it, with its factor."""
    rng = np.random.default_rng(2)
    x, rows = rng.standard_normal((6, 96)), rng.standard_normal((2, 96))
    assert column_range(x, rows, rng.standard_normal((6, 2))) is None
    found = column_range(x, rows, 0.5 * x[:, 10:20] @ rows[:, 10:20].T)
    assert found is not None
    assert found[:3] == (10, 20, pytest.approx(1.5))


@pytest.mark.slow
def test_a_change_that_moves_nothing_explains_nothing(tmp_path: Path) -> None:
    """Logits that are off by little more than their limit: a weight whose unrecorded rows stood in another order would leave them so."""
    model = tmp_path / "model.gguf"
    synthesize(model, SHAPE, weight_type="f32", seed=3)
    faulty, tokens = Faulty(model), tokens_of(model, 12, seed=7)
    scatter = np.random.default_rng(3).standard_normal((12, SHAPE.vocab))

    def noisy(step: Step) -> Step:
        def op(*inputs: np.ndarray, **params: object) -> np.ndarray:
            value = step.op(*inputs, **params)
            size = np.sqrt(np.mean(value.astype(np.float64) ** 2, axis=1, keepdims=True))
            return (value + 4.5e-5 * size * scatter).astype(np.float32)

        return replace(step, op=op) if step.makes == "logits" else step

    dump = faulty.dump(Planted(()), tokens, points="*", size=10, steps=[noisy(step) for step in faulty.right])
    answer = explain(replace(dump, header=None), model, replace(PATIENT, tokens=tokens, budget=1.0))
    assert answer.first is not None
    assert "stand in the order" not in answer.law


@pytest.mark.slow
def test_a_part_of_a_weight_is_changed_in_its_own_shape(small_model: Callable[..., Path], reference: Reference) -> None:
    """An operation that takes a row of a table: what could be wrong with it is tried on the row, not in the shape of the table."""
    model = small_model("jina-bert-v3", kind="f32")
    faulty, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 4, seed=7)
    part = next(step for step in faulty.right if any(isinstance(weight, WeightPart) for weight in step.weights))
    noise = np.random.default_rng(3).standard_normal((4, 1024))

    def noisy(*inputs: np.ndarray, **params: object) -> np.ndarray:
        value = part.op(*inputs, **params)
        return (value * (1 + 2e-4 * noise[:, : value.shape[-1]])).astype(np.float32)

    steps = [replace(step, op=noisy) if step is part else step for step in faulty.right]
    dump = faulty.dump(Planted(()), tokens, points="*", size=1 << 20, steps=steps)
    answer = explain(replace(dump, header=None), model, replace(PATIENT, tokens=tokens, budget=1.0))
    assert answer.first is not None
    assert answer.first.checkpoint == part.makes
