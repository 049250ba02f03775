"""`parity diff --model`: what F16 and BF16 arithmetic cost is measured on this model and prompt."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli
from explaining import unstated
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, half_sums
from slow import slow_but

from checkpoints.answers.diff import TruthRecord
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine import ops
from engine.backend import Array
from engine.faults import CATALOGUE, plant
from engine.faults.fitted import FITTED
from engine.graph import Step
from engine.replay.precision import rounded
from engine.synth import Shape, synthesize
from parity.diff.compare import Options, compare
from parity.diff.verdict.scatter import spares_elements
from parity.explain.explain import explain
from parity.explain.on_model import compared_on
from parity.explain.rounding.arithmetic import of_unknown_arithmetic
from parity.explain.rounding.known_model import KnownModel
from parity.explain.rounding.precision import PrecisionFloor, mismatch, typical
from parity.explain.rounding.spared import spares_records
from reference.client import Reference
from reference.jobs import DumpJob
from reports.sentences import answer, reasons, remarks

PROMPT = (1, 17, 40, 299, 5, 5, 80, 3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A qwen2 that is deep enough for noise to grow."""
    path = tmp_path_factory.mktemp("floor") / "small.gguf"
    synthesize(path, Shape("qwen2", 24, 112, 14, 2, 0, 128, 300), weight_type="f32", seed=11)
    return Faulty(path)


def _dump(engine: Faulty, steps: Sequence[Step], compute: str) -> Dump:
    dump = engine.dump(Planted(()), PROMPT, steps=steps)
    assert dump.header is not None
    return replace(dump, header=replace(dump.header, compute=compute))


@pytest.fixture(scope="module")
def right(engine: Faulty) -> Dump:
    """What it dumps where nothing is wrong."""
    return _dump(engine, engine.right, "f32")


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_a_right_engine_keeps_the_measured_limits(engine: Faulty, right: Dump, kind: str) -> None:
    """Rounded products alone stay within what rounded products and activations cost, and would not pass as float32."""
    ours = _dump(engine, rounded(engine.right, kind, storage=False), kind)
    verdict = compared_on(ours, right, Options(), engine.model).verdict
    assert verdict
    assert verdict.limits.source.startswith("measured")
    assert ours.header is not None
    assert not compare(replace(ours, header=replace(ours.header, compute="f32")), right)


@pytest.mark.slow
def test_an_arithmetic_is_measured_where_a_product_is_recorded_before_its_bias(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """llama.cpp on its own 8-bit activations: the first difference is the product before its bias, which is no step of ours. The next
    point tells the arithmetic, and no product is blamed."""
    model, sides = small_model("starcoder2", kind="q8_0", layers=2), {}
    for mode in ("native", "exact"):
        out = tmp_path / f"{mode}.jsonl"
        reference.dump(DumpJob(model=model, out=out, tokens=PROMPT, mode=mode, points="blk.0.*,blk.1.l_out,output_norm,logits"))
        sides[mode] = read(out)
    ours = sides["native"]
    assert ours.header is not None
    ours = replace(ours, header=replace(ours.header, source="an engine", mode="exact", compute="", dataflow=None))
    verdict = compared_on(ours, sides["exact"], Options(), model).verdict
    assert verdict
    assert verdict.precision is not None
    assert (verdict.precision.arithmetic, verdict.precision.in_float32) == ("q8", "blk.0.Qcur")


def test_a_deep_right_engine_is_excused_by_the_table_and_proven_by_the_model(engine: Faulty, right: Dump) -> None:
    """Activations kept in BF16 cost more over 24 layers than a limit for every model allows: without a jump that is excused, and said;
    measured, they are right."""
    ours = _dump(engine, rounded(engine.right, "bf16", storage=True), "bf16")
    excused = compare(ours, right)
    assert excused
    assert any("an assumption: --model measures it" in note for note in excused.notes)
    assert not compare(ours, right, Options(strict=True))
    assert compared_on(ours, right, Options(), engine.model).verdict


@pytest.mark.slow
def test_a_fault_stands_out_of_the_measured_floor(engine: Faulty, right: Dump) -> None:
    """Limits that are measured are no free pass: another activation diverges in F16 and in BF16."""
    for kind in ("f16", "bf16"):
        steps = plant(engine.right, CATALOGUE["activation"], activation="GELU (exact)")
        ours = _dump(engine, rounded(steps, kind, storage=True), kind)
        verdict = compared_on(ours, right, Options(), engine.model).verdict
        assert verdict.first_divergence is not None
        assert verdict.first_divergence.checkpoint == "blk.0.l_out"


@pytest.mark.parametrize("kind", ["f32", "tf32", "f16", "bf16", "q8"])
def test_unknown_arithmetic_is_found(engine: Faulty, right: Dump, kind: str) -> None:
    """An engine that does not say what it computes in is judged by the model: the precision at which the sides agree is named."""
    steps = engine.right if kind == "f32" else rounded(engine.right, kind, storage=kind != "q8")
    ours = replace(_dump(engine, steps, ""), header=None)
    verdict = compared_on(ours, right, Options(), engine.model).verdict
    assert verdict
    assert verdict.precision is not None
    assert not verdict.precision.assumed
    assert verdict.precision.arithmetic in ({"tf32", "f16"} if kind in ("tf32", "f16") else {kind})
    assert bool(verdict.precision.in_float32) == (kind != "f32")


def test_what_an_arithmetic_spares_is_not_explained_by_it(engine: Faulty) -> None:
    """Queries scaled in the first layer, keys and values exact beside them: no arithmetic rounds one product and not the other."""
    right = engine.dump(Planted(()), PROMPT, points="blk.0.q,blk.0.v,blk.0.k")
    fault = next(fit.fault for fit in FITTED if fit.fault.name == "multiplier")
    steps = plant(engine.right, fault, (0,), by=1.01, part="the result", at=("q",))
    ours = replace(engine.dump(Planted(()), PROMPT, steps=steps, points="blk.0.q,blk.0.v,blk.0.k"), header=None)
    verdict = compared_on(ours, right, Options(), engine.model).verdict
    assert not verdict
    assert verdict.precision is not None
    assert verdict.precision.arithmetic == "f32"


@pytest.mark.slow
def test_a_fault_in_float32_is_no_precision(engine: Faulty, right: Dump) -> None:
    """What jumps in a later layer, after layers that agree as float32 does, is judged as float32; without the model as assumed."""
    steps = plant(engine.right, CATALOGUE["norm-epsilon"], (5,), epsilon=1e-5)
    ours = replace(_dump(engine, steps, ""), header=None)
    verdict = compared_on(ours, right, Options(), engine.model).verdict
    assert not verdict
    assert verdict.precision is not None
    assert verdict.precision.arithmetic == "f32"
    assumed = compare(ours, right)
    assert assumed.precision is not None
    assert assumed.precision.assumed


@pytest.mark.parametrize("factor", slow_but([1.005, 1.02], 1.005))
def test_a_fault_of_the_size_of_bf16_is_not_acquitted(engine: Faulty, right: Dump, factor: float) -> None:
    """Values scaled a little cost as much as BF16 or 8 bits do, but are not its rounding: no parity."""

    def scaled(step: Step) -> Step:
        return replace(step, op=lambda *given, **kwargs: step.op(*given, **kwargs) * np.float32(factor))

    ours = _dump(engine, [scaled(step) if step.makes.endswith(".v") else step for step in engine.right], "")
    assert not compared_on(ours, right, Options(), engine.model).verdict


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ffn_out", "v", "attn_out"])
def test_a_factor_of_the_size_of_f16_is_no_rounding(engine: Faulty, right: Dump, kind: str) -> None:
    """A product a thousandth too large costs what F16 does, but its errors follow that factor and are not scattered: no parity."""

    def scaled(step: Step) -> Step:
        return replace(step, op=lambda *given, **kwargs: step.op(*given, **kwargs) * np.float32(1.001))

    ours = _dump(engine, [scaled(step) if step.makes.endswith(f".{kind}") else step for step in engine.right], "")
    verdict = compared_on(ours, right, Options(), engine.model).verdict
    assert not verdict
    assert verdict.pattern is not None
    assert verdict.pattern.code == "one-number"
    assert "were multiplied by 1.0010" in verdict.pattern.sentence


@pytest.mark.slow
def test_explain_takes_no_factor_for_f16(engine: Faulty) -> None:
    """The same factor is no arithmetic to `explain` either, at the default points; sums in F16 are."""
    scaled = [
        replace(step, op=lambda *given, _op=step.op, **kwargs: _op(*given, **kwargs) * np.float32(1.001))
        if step.makes.endswith(".v")
        else step
        for step in engine.right
    ]
    answer = explain(_dump(engine, scaled, ""), engine.model, PATIENT)
    assert not answer
    assert not answer.precision_only
    sums = [replace(step, op=half_sums) if step.op is ops.linear else step for step in engine.right]
    assert explain(_dump(engine, sums, ""), engine.model, PATIENT).precision_only in ("f16", "tf32")


@pytest.mark.slow
def test_sums_in_f16_follow_no_number(engine: Faulty, right: Dump) -> None:
    """A right engine with sums in F16, whose errors are not those of our own rounding, keeps its parity."""
    ours = _dump(engine, [replace(step, op=half_sums) if step.op is ops.linear else step for step in engine.right], "")
    verdict = compared_on(ours, right, Options(), engine.model).verdict
    assert verdict
    assert verdict.precision is not None
    assert verdict.precision.arithmetic in ("f16", "tf32")


def test_a_search_for_one_number_that_is_out_of_time_acquits_nothing(engine: Faulty, right: Dump) -> None:
    """The same engine where no time is left to try a number: its size may be that of F16, which is undecided, and not parity."""
    ours = _dump(engine, [replace(step, op=half_sums) if step.op is ops.linear else step for step in engine.right], "")
    verdict = of_unknown_arithmetic(ours, right, Options(), KnownModel(right, engine.model), seconds=0).verdict
    assert not verdict
    assert verdict.pattern is not None
    assert verdict.pattern.code == "undecided"


@pytest.mark.parametrize(
    "factor", [1.0, pytest.param(1.05, marks=pytest.mark.slow), pytest.param(40.0, marks=pytest.mark.slow)]
)
def test_a_norm_that_rounds_twice_is_right_and_hides_no_fault(tmp_path: Path, factor: float) -> None:
    """BF16 that rounds a norm's row before its weight as well, unstated, is parity in BF16; not with a factor in that norm beside it."""
    synthesize(tmp_path / "bf16.gguf", Shape("qwen2", 2, 112, 14, 2, 0, 128, 300), weight_type="bf16", seed=11)
    engine = Faulty(tmp_path / "bf16.gguf")
    steps = rounded(engine.right, "bf16", storage=True, normed=True)

    def scaled(*arguments: Any, op: Callable[..., Array], **params: Any) -> Array:
        return op(*arguments, **params) * np.float32(factor)

    steps = [replace(step, op=partial(scaled, op=step.op)) if step.makes == "blk.0.attn_norm" else step for step in steps]
    ours = unstated(engine.dump(Planted(()), PROMPT, points="all", steps=steps))
    verdict = compared_on(ours, engine.dump(Planted(()), PROMPT, points="all"), Options(), engine.model).verdict
    assert bool(verdict) == (factor == 1.0)
    assert verdict.precision is not None
    assert (verdict.precision.arithmetic == "bf16") == (factor == 1.0)


def test_no_side_is_called_wrong_where_lower_arithmetic_may_be_all(engine: Faulty, right: Dump) -> None:
    """An undecided answer says how far float64 is, and not "ours is wrong"; of a side that states float32 it does say that."""
    ours = _dump(engine, [replace(step, op=half_sums) if step.op is ops.linear else step for step in engine.right], "")
    known = KnownModel(right, engine.model)
    verdict = of_unknown_arithmetic(ours, right, Options(), known, seconds=0).verdict
    verdict = replace(verdict, truth=TruthRecord("blk.0.l_out", 1e-6, 1e-13, "ours", 0))
    assert "ours is wrong" not in dict(reasons(verdict))["float64"]
    assert verdict.precision is not None
    stated = replace(verdict, precision=replace(verdict.precision, arithmetic="f32", source="stated"))
    assert "ours is wrong" in dict(reasons(stated))["float64"]


@pytest.mark.slow
def test_products_that_8_bits_hold_exactly_convict_nobody(small_model: Callable[..., Path], reference: Reference) -> None:
    """An embedding in IQ4_NL, which the first products read, is 8-bit numbers already: they are exact in an 8-bit engine, too."""
    model = small_model("exaone4", kind="iq4_nl")
    engine = Faulty(model, reference.graph(model))
    right = engine.dump(Planted(()), PROMPT, points="all", size=1 << 20, bare=False)
    ours = engine.dump(
        Planted(()), PROMPT, points="all", size=1 << 20, bare=False, steps=rounded(engine.right, "q8", storage=False)
    )
    assert ours.header is not None
    unstated = replace(ours, header=replace(ours.header, compute=""))
    verdict = compared_on(unstated, right, Options(), model).verdict
    assert verdict
    assert verdict.precision is not None
    assert verdict.precision.arithmetic == "q8"


def test_the_first_words_say_what_is_assumed(engine: Faulty, right: Dump) -> None:
    """Parity under an assumed limit begins with the arithmetic it holds for, and says what float32 would make of it."""
    ours = replace(_dump(engine, rounded(engine.right, "f16", storage=False), ""), header=None)
    verdict = compare(ours, right)
    assert verdict
    assert answer(verdict).startswith("parity as F16 arithmetic (assumed: your dump does not say): 56 of 56 records agree")
    assert ("float32", "in float32 blk.0.l_out would be a divergence; --compute f32 applies that limit") in list(
        remarks(verdict)
    )
    exact = replace(_dump(engine, engine.right, ""), header=None)
    assert answer(compare(exact, right)).startswith("parity: 56 of 56 records agree")


def test_it_is_an_option(parity: Cli) -> None:
    """`diff --model` measures, `--arbiter` asks float64, `--compute q8` is an arithmetic."""
    printed = parity("diff", "--help").out
    assert all(option in printed for option in ("--model", "--arbiter", "q8"))


def test_rows_of_zeros_hide_no_arithmetic() -> None:
    """What an arithmetic makes of a row of zeros is infinitely far from it; that counts neither for a limit nor for the fit."""
    zeros = np.array([np.inf, 1e-6, 3e-6])
    cost = PrecisionFloor("f16", (zeros, np.full(3, np.inf)), (zeros / 2, np.full(3, np.inf)))
    assert cost.cost().tolist() == [2e-6, 0.0]
    assert mismatch([(1e-6, np.inf, np.inf), (2e-6, 2e-6, 1e-6)]) == 0


@pytest.mark.slow
def test_what_is_partly_exact_is_no_rounding(engine: Faulty) -> None:
    """Every other element of a product is off by as much as F16 costs, and the others are exactly right: no parity."""

    def changed(*given: object, op: Callable[..., np.ndarray], **kwargs: object) -> np.ndarray:
        value = op(*given, **kwargs).copy()
        rng = np.random.default_rng(3)
        value[:, ::2] *= (1 + 3e-4 * rng.standard_normal(value[:, ::2].shape)).astype(np.float32)
        return value

    steps = [replace(step, op=partial(changed, op=step.op)) if step.makes == "blk.0.q" else step for step in engine.right]
    right, ours = (engine.dump(Planted(()), PROMPT, points="blk.0.q", steps=given) for given in (engine.right, steps))
    assert not compared_on(replace(ours, header=None), right, Options(), engine.model).verdict


@pytest.mark.parametrize("factor", [1.0, 1.03, 1.3])
def test_a_type_that_holds_some_weights_exactly_rounds_the_others(factor: float, tmp_path: Path) -> None:
    """An F16 engine of Q4_0 embeddings, of which half are whole in F16: no fault, and a product that is off beside it is one."""
    path = tmp_path / "coarse.gguf"
    synthesize(path, Shape("qwen2", layers=2, width=64, heads=4, kv_heads=2, ff=128, vocab=300), weight_type="q4_0", seed=3)
    coarse = Faulty(path)
    fault = next(fit.fault for fit in FITTED if fit.fault.name == "multiplier")
    steps = plant(coarse.right, fault, (1,), by=factor, part="the result", at=("ffn_out",)) if factor != 1 else coarse.right
    right = _dump(coarse, coarse.right, "f32")
    ours = replace(_dump(coarse, rounded(steps, "f16", storage=True), ""), header=None)
    verdict = compared_on(ours, right, Options(), coarse.model).verdict
    assert bool(verdict) == (factor == 1)
    assert factor != 1 or (verdict.precision is not None and verdict.precision.arithmetic in ("f16", "tf32"))


def test_arithmetic_spares_no_records_and_no_elements() -> None:
    """Exact records or elements among wrong ones are told; rounding that is exact here and there by luck, and zeros, are not."""
    costs, limits = np.full(8, 1e-7), np.full(8, 1e-10)
    assert spares_records(np.array([1e-13, *[1e-7] * 7]), costs, limits)
    assert not spares_records(np.full(8, 1e-8), costs, limits)
    assert not spares_records(np.full(8, 1e-13), np.full(8, 1e-10), limits)  # it costs nothing to see
    rng = np.random.default_rng(0)
    right, noise = rng.standard_normal((2, 5, 16))
    known = np.ones((5, 16), dtype=bool)
    assert not spares_elements(3e-4 * noise, right, known)
    noise[:, 8:] = 0
    assert spares_elements(3e-4 * noise, right, known)
    right[:, 8:] = 0  # what is 0 stays 0
    assert not spares_elements(3e-4 * noise, right, known)


def test_one_record_in_which_terms_cancel_does_not_decide_a_point_s_size() -> None:
    """Where an arithmetic costs one of five records a hundred times the others', the records' ratios count, not that record's; where it
    costs all the same, an error of one record is one.
    """
    even, uneven = np.full(5, 1e-7), np.array([1e-7, 1e-7, 1e-7, 1e-7, 1e-5])
    error, products, storage = typical(np.array([2e-7, 1e-7, 2e-7, 1e-7, 2e-7]), even, uneven)
    assert 0.2 < error / max(products, storage) < 2
    error, products, storage = typical(uneven, even, even)
    assert error / max(products, storage) == pytest.approx(20.8)
    assert typical(np.zeros(5), np.zeros(5), uneven)[2] == pytest.approx(uneven.mean())
