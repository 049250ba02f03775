"""Values that are degenerate (zeros, NaN in the reference, sums that cancel, numbers below float32's normal ones) accuse nobody."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from dumps import Arrays, dump, random
from gguf import GGUFReader
from msgspec.structs import replace
from numpy.typing import NDArray
from planted import Faulty

from checkpoints.answers.diff import Verdict
from checkpoints.answers.isolate import NOT_OBSERVABLE, WRONG
from checkpoints.points import LOGITS
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine.graph import Step
from engine.replay.wide import Variant, values_of
from parity.diff.compare import Options, compare
from parity.isolate.isolate import IsolateRequest, isolate
from parity.lint.bits import confusion
from parity.lint.lint import lint
from parity.run.ours import OursJob
from parity.run.ours import dump as dump_ours
from reference.client import Reference
from reference.jobs import DumpJob
from reports.sentences import answer

POINT = "blk.5.l_out"
SMALL = 4  # the position whose row all but cancels


@contextmanager
def weights(model: Path) -> Iterator[dict[str, NDArray[np.float32]]]:
    """The float32 tensors of a model file by name, to be changed in place."""
    yield {tensor.name: tensor.data for tensor in GGUFReader(str(model), "r+").tensors}


def changed(model: Path, out: Path, **values: float) -> Path:
    """A copy of a model whose tensors with such a part in their names hold one number."""
    out.write_bytes(model.read_bytes())
    with weights(out) as tensors:
        for part, value in values.items():
            for name in tensors:
                if f".{part}." in name:
                    tensors[name][...] = value
    return out


@pytest.mark.parametrize("part", ["attn_q", "attn_k", "attn_output"])
@pytest.mark.parametrize("tokens", [(5, 77, 300, 9), (7,), (8, 8, 8)])
def test_isolate_accuses_no_model_whose_weights_are_zero(
    part: str, tokens: tuple[int, ...], synthetic: Callable[..., Path], tmp_path: Path, reference: Reference
) -> None:
    """Queries or keys of zero leave attention uniform, and RoPE changes nothing: the operations are proven, and no finding is left."""
    model = changed(synthetic(layers=1, biases=False, heads=1, kv_heads=1), tmp_path / "zero.gguf", **{part: 0.0})
    isolation = isolate(IsolateRequest(model, tokens=tokens), reference)
    assert not [item.operation for item in isolation.operations if item.status == WRONG]
    assert isolation.findings == ()


def test_isolate_says_nothing_of_operations_on_nan(
    synthetic: Callable[..., Path], tmp_path: Path, reference: Reference
) -> None:
    """What reads NaN is neither proven by giving NaN nor wrong."""
    model = changed(synthetic(layers=2), tmp_path / "nan.gguf", attn_v=np.nan)
    isolation = isolate(IsolateRequest(model, tokens=(5, 77, 300, 9)), reference)
    operations = {(item.operation, item.layer): item for item in isolation.operations}
    assert operations["kqv_out", 0].status == NOT_OBSERVABLE
    assert operations["l_out", 1].reason == "its inputs are not finite"
    assert not [item.operation for item in isolation.operations if item.status == WRONG]


def arrays(noise: float, at_small: float = 0.0) -> tuple[Arrays, Arrays]:
    """Two sides with errors of one size at all positions, one row of which is a hundredth of the others; more error there if asked."""
    right = random()
    right[LOGITS][SMALL] /= 100
    ours = {name: x.copy() for name, x in right.items()}
    rng = np.random.default_rng(5)
    for name in ours if noise else ():
        if name != "embd":
            ours[name] += (noise * rng.standard_normal(ours[name].shape)).astype(np.float32)
    ours[LOGITS][SMALL] += (at_small * rng.standard_normal(ours[LOGITS][SMALL].shape)).astype(np.float32)
    return ours, right


@pytest.mark.parametrize("size", [10, 64])
@pytest.mark.parametrize("sketch", [True, False])
def test_a_row_that_cancels_blames_no_operation(size: int, sketch: bool) -> None:
    """An error over the limit that is no larger than at positions that agree is rounding, or a small fault: that is said."""
    verdict = _verdict(*arrays(3e-6), size, sketch)
    assert not verdict
    assert verdict.pattern is not None
    assert verdict.pattern.code == "undecided"
    assert not verdict.operation
    worse = _verdict(*arrays(3e-7, at_small=1e-5), size, sketch)
    assert worse.pattern is not None
    assert worse.pattern.code != "undecided"


def test_a_row_that_cancels_blames_nothing_beside_a_fault() -> None:
    """Wrong logits there and at another position make no fault of the rounding before them, and are named as what differs by more."""
    right = random(("embd", POINT, LOGITS))
    right[POINT][SMALL] /= 1000
    rng = np.random.default_rng(5)
    ours = {name: x + np.float32(3e-6) * rng.standard_normal(x.shape).astype(np.float32) for name, x in right.items()}
    ours["embd"] = right["embd"]
    ours[LOGITS][[0, SMALL]] *= np.float32(1.5)
    verdict = _verdict(ours, right, 64, sketch=True)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == POINT
    assert verdict.pattern is not None
    assert verdict.pattern.code == "undecided"
    assert f"; {LOGITS} differs by more" in verdict.pattern.sentence
    assert not verdict.operation


def test_a_gate_of_one_number_that_cancels_is_held_to_the_largest() -> None:
    """8-bit activations move a gate by as much at all positions: where it is nearly 0 none is blamed, unless it is off by more."""
    right = random(("embd", "blk.0.gate"), positions=7)
    right["blk.0.gate"] = np.array([[1.0], [0.9], [0.02], [1.1], [0.8], [0.7], [1.2]], dtype=np.float32)
    for off, decided in ((0.015, False), (0.2, True)):
        ours = {name: rows.copy() for name, rows in right.items()}
        ours["blk.0.gate"][2] += np.float32(off)
        verdict = compare(dump(ours), dump(right), Options(compute="q8"))
        assert verdict.pattern is not None
        assert (verdict.pattern.code != "undecided") == decided


@pytest.mark.parametrize("elements", [slice(3, 4), slice(None)])
@pytest.mark.parametrize("sketch", [True, False])
@pytest.mark.parametrize("theirs", [True, False])
def test_nan_at_one_position_is_no_rounding(elements: slice, sketch: bool, theirs: bool) -> None:
    """What is not finite has no size to be compared with the errors of positions that agree: it stays the answer."""
    ours, right = arrays(3e-8)
    (right if theirs else ours)[LOGITS][6, elements] = np.nan
    verdict = _verdict(ours, right, 10, sketch)
    assert verdict.pattern is not None
    assert verdict.pattern.code == ("reference-nonfinite" if theirs else "nonfinite")


def _verdict(ours: Arrays, right: Arrays, size: int, sketch: bool) -> Verdict:
    mine = dump(ours, slice_size=size)
    if not sketch:
        mine = replace(mine, points={name: replace(rows, sketch=None, stats={}) for name, rows in mine.points.items()})
    return compare(mine, dump(right, path="ref.jsonl"), Options(compute="f32"))


def test_numbers_below_the_normal_ones_may_be_flushed_to_zero() -> None:
    """An engine on a device that flushes such numbers to zero agrees; one that is zero where a normal number belongs does not."""
    right = random()
    right[POINT][2] *= np.float32(1e-39)
    flushed = {name: np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x) for name, x in right.items()}
    assert compare(dump(flushed), dump(right), Options(strict=True))
    right[POINT][2, 5] = 1e-30
    assert not compare(dump(flushed), dump(right), Options(strict=True))


def test_nan_in_the_reference_is_said_and_acquits_nobody() -> None:
    """Behind NaN of the reference nothing can be judged, whether ours has numbers there or NaN, too."""
    right = random()
    ours = {name: x.copy() for name, x in right.items()}
    for name in (POINT, "blk.10.l_out", "blk.23.l_out", "output_norm", "logits"):
        right[name][3:] = np.nan
    for mine in (ours, right):
        verdict = compare(dump(mine), dump(right))
        assert not verdict
        assert verdict.first_divergence is not None
        assert (verdict.first_divergence.checkpoint, verdict.first_divergence.token_idx) == (POINT, 3)
        assert verdict.pattern is not None
        assert "the reference is not finite" in verdict.pattern.sentence
        assert "wrong" not in verdict.operation
        assert "cannot be judged" in answer(verdict)


def test_a_mask_on_both_sides_agrees() -> None:
    """Rows of −∞ alike on both sides are values, not missing ones."""
    right = random()
    right[POINT][1] = -np.inf
    assert compare(dump(right), dump(right))


def test_float64_is_known_for_values_that_steps_keep_to_themselves(synthetic: Callable[..., Path]) -> None:
    """A dump may have recorded what is no point of ours."""
    transformer = Faulty(synthetic(layers=1)).transformer
    name = "blk.0.ffn_norm"
    hidden = [replace(step, inner=True) if step.makes == name else step for step in transformer.steps]
    weights_of, backend = transformer.weights, transformer.backend

    def of(steps: list[Step]) -> NDArray[np.float64]:
        return values_of(Variant.WIDE, steps, (5, 6), (0, 1), (0, 0), weights_of, backend, {name})[name]

    assert np.array_equal(of(hidden), of(list(transformer.steps)))


@pytest.mark.parametrize("part", ["attn_v", "attn_output", "ffn_down"])
def test_lint_knows_layers_of_zeros(part: str, synthetic: Callable[..., Path], tmp_path: Path, reference: Reference) -> None:
    """Layers that were added to a trained model add nothing at first: with the model at hand that is no suspicion."""
    model = changed(synthetic(layers=3, biases=False), tmp_path / "zero.gguf", **{part: 0.0})
    out = tmp_path / "ref.jsonl"
    reference.dump(DumpJob(model, out, (5, 77, 300, 9), points="all"))
    assert lint(read(out)).findings != ()
    assert lint(read(out), model).findings == ()


@pytest.mark.parametrize(
    "name", ["gpt-oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek2", "bailingmoe2"))]
)
def test_our_own_dumps_are_clean_without_the_model(
    name: str, small_model: Callable[..., Path], tmp_path: Path, reference: Reference
) -> None:
    """Keys and values in one cache, sinks, and masks of experts: a right dump that does not say how its points are made."""
    model = small_model(name)
    faulty = Faulty(model, reference.graph(model))
    out = tmp_path / "ours.jsonl"
    dump_ours(faulty.transformer, OursJob(out, (5, 77, 300, 9), points="all"))
    dump = read(out)
    assert lint(dump).findings == ()
    assert lint(_bare(dump, 10)).findings == ()


def _bare(whole: Dump, size: int) -> Dump:
    points = {
        name: replace(
            rows,
            values=rows.values[:, :size],
            counts=np.minimum(rows.counts, size),
            stats={},
            sketch=None,
            shapes=((),) * len(rows),
        )
        for name, rows in whole.points.items()
    }
    return Dump("bare.jsonl", None, points)


def test_zeros_and_saturated_values_are_no_other_type() -> None:
    """Zeros among BF16 values (quantised embeddings) and values near ±1 (what tanh saturates) are what they say."""
    rng = np.random.default_rng(3)
    rows = _bf16(rng.standard_normal((6, 64)).astype(np.float32))
    rows[:, 4] = 0
    saturated = _bf16(np.tanh(4 * np.sign(rows[:, :10]) + rows[:, :10]))
    for each in (rows, saturated):
        assert not any(wrong.any() for wrong in confusion(each).values())


def test_decays_are_no_other_type() -> None:
    """exp(−exp(x)) in BF16 spans as many powers of two as F16 bits read as BF16 do, and is positive; most rows of the latter are found."""
    normal = np.random.default_rng(4).standard_normal((2000, 10)).astype(np.float32)
    decays = _bf16(np.exp(-np.exp(1.5 * normal)))
    assert not any(wrong.any() for wrong in confusion(decays).values())
    misread = (normal.astype(np.float16).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    assert confusion(misread)["F16 bits read as BF16"].mean() > 0.75


def _bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
