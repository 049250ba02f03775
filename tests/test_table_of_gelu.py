"""`diff` without a model where llama.cpp's GELU is a table of float16, and where norms hide what is wrong before them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dumps import HEADER, Arrays, dump, random
from msgspec.structs import replace
from numpy.typing import NDArray
from planted import Faulty, Planted, tokens_of

from checkpoints.answers.diff import Verdict
from checkpoints.dataflow import Computation
from checkpoints.reading.reader import read
from checkpoints.record import Dump, Rows
from engine.backend import Array
from engine.graph import Step
from engine.replay.wide import without_tables
from parity.diff.compare import Options, compare
from parity.explain.on_model import compared_on, three_on
from reference.client import Reference
from reference.jobs import DumpJob

RIGHT = Planted(())
DEFAULT = ("embd", "l_out", "output_norm", "logits")


class Sides:
    """The engine of a small model and llama.cpp's dump of a prompt."""

    def __init__(self, model: Path, reference: Reference, folder: Path) -> None:
        self.model, self.faulty = model, Faulty(model, reference.graph(model))
        self.tokens = tokens_of(model, 9, seed=7)
        reference.dump(DumpJob(model, folder / "ref.jsonl", self.tokens, points="all", slice_size=None))
        self.ref = read(folder / "ref.jsonl")

    def bare(self, size: int, steps: list[Step] | None = None, noise: float = 0.0, only: str = "") -> Dump:
        """The bare lines of an engine at the default points, with noise of an NMSE in the layers' outputs, or in one point."""
        draw = np.random.default_rng(3)
        dump = self.faulty.dump(RIGHT, self.tokens, points="blk.*.l_out,embd,output_norm,logits", size=1 << 20, steps=steps)
        points = {}
        for name, rows in dump.points.items():
            if name.rpartition(".")[2] not in DEFAULT:
                continue
            values = rows.values
            if noise and (name == only if only else name.endswith("l_out")):
                scale = np.sqrt(noise * np.square(values, dtype=np.float64).mean(axis=1, keepdims=True))
                values = (values + scale * draw.standard_normal(values.shape)).astype(np.float32)
            cut = {"values": values[:, :size], "counts": np.minimum(rows.counts, size), "shapes": ((),) * len(rows)}
            points[name] = replace(rows, **cut, stats={}, sketch=None)
        return Dump("ours.jsonl", None, points)

    def judged(self, size: int, kinds: tuple[str, ...] = (), steps: list[Step] | None = None, change: Any = None) -> Verdict:
        """What is said of the bare lines of an engine that runs these steps, after `change` to each point's values."""
        dump = self.faulty.dump(RIGHT, self.tokens, points="all", size=1 << 20, steps=steps)
        points = {}
        for name, rows in dump.points.items():
            kind = name.rpartition(".")[2]
            if kinds and kind not in kinds:
                continue
            values = rows.values if change is None else change(kind, rows.values)
            points[name] = replace(
                rows, values=values[:, :size], counts=np.minimum(rows.counts, size), shapes=((),) * len(rows)
            )
        return compare(Dump("ours.jsonl", None, points), self.ref, Options(compute="f32"))


@pytest.fixture(scope="module")
def sides(
    reference: Reference, small_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Sides]:
    """Both sides of a recipe's model."""
    engines: dict[str, Sides] = {}

    def of(name: str) -> Sides:
        if name not in engines:
            engines[name] = Sides(small_model(name, kind="f32"), reference, tmp_path_factory.mktemp(name))
        return engines[name]

    return of


def edited(steps: list[Step], name: str, change: Callable[[Array], Array]) -> list[Step]:
    """The steps with one result changed."""
    return [
        replace(step, op=lambda *inputs, _op=step.op, **params: change(_op(*inputs, **params))) if step.makes == name else step
        for step in steps
    ]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gemma3", "gemma2", "gpt2", "falcon"])
@pytest.mark.parametrize(("size", "kinds"), [(16, DEFAULT), (12, ()), (1 << 20, ())])
def test_a_step_of_the_table_is_no_fault(recipe: str, size: int, kinds: tuple[str, ...], sides: Callable[[str], Sides]) -> None:
    """A right float32 engine meets another entry of the table here and there: agreement, and no operation is blamed."""
    verdict = sides(recipe).judged(size, kinds)
    assert verdict
    assert not verdict.record_faults


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gpt2", "gemma4"])
@pytest.mark.parametrize("exact", [False, True])
def test_with_the_model_what_agrees_with_neither_gelu_is_wrong(recipe: str, exact: bool, sides: Callable[[str], Sides]) -> None:
    """An engine with ggml's table and one with the function itself are right; noise of 1e-5 after it is seen in both."""
    both = sides(recipe)
    steps = without_tables(both.faulty.right) if exact else list(both.faulty.right)
    last = [name for name in both.ref.points if name.endswith("l_out")][-1]
    for size, noise, only in ((16, 0.0, ""), (1 << 20, 0.0, ""), (16, 1e-5, ""), (16, 1e-5, last)):
        ours = both.bare(size, steps, noise, only)
        verdict = compared_on(ours, both.ref, Options(compute="f32"), both.model, third_side=False).verdict
        if not noise:
            assert verdict, (size, verdict.first_divergence)
            assert not verdict.record_faults
        else:
            assert not verdict or verdict.record_faults, only


@pytest.mark.parametrize("factor", [1.0, 1.001, 1.003])
def test_the_last_logits_under_another_number_are_right_behind_the_table(factor: float, sides: Callable[[str], Sides]) -> None:
    """They may be off by as much as what they are made from, at their own position, and by no more."""
    both = sides("gemma3")
    ours = both.bare(16, without_tables(both.faulty.right))
    last = ours.points["logits"].take([len(both.tokens) - 1])
    first = replace(last, token_idx=np.zeros(1, np.int64), values=last.values * np.float32(factor))
    ours = replace(ours, points={**ours.points, "logits": first})
    assert bool(compared_on(ours, both.ref, Options(compute="f32"), both.model).verdict) == (factor == 1)


@pytest.mark.slow
def test_a_fault_after_the_table_is_seen(sides: Callable[[str], Sides]) -> None:
    """A final norm that is scaled by 1.0003 jumps out of what the table leaves, whole rows given; the activation itself is not excused."""
    both = sides("gemma3")
    right = list(both.faulty.right)
    verdict = both.judged(1 << 20, steps=edited(right, "output_norm", lambda x: x * np.float32(1.0003)))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "output_norm"
    assert not any("a fault, or the table" in note for note in verdict.notes)
    verdict = both.judged(16, steps=edited(right, "blk.1.ffn_geglu", lambda x: x * np.float32(1.01)))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.1.ffn_geglu"
    assert any("a fault, or the table" in note for note in verdict.notes)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gemma3"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_fault_smaller_than_the_table_is_seen_with_the_model(recipe: str, exact: bool, sides: Callable[[str], Sides]) -> None:
    """A layer's output scaled by 1.0003: less than the table's rounding, far more than other entries of it make."""
    both = sides(recipe)
    right = without_tables(both.faulty.right) if exact else list(both.faulty.right)
    scaled = edited(right, "blk.0.l_out", lambda x: x * np.float32(1.0003))
    verdict = compared_on(both.bare(1 << 20, scaled), both.ref, Options(compute="f32"), both.model, third_side=False).verdict
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.0.l_out"


@pytest.mark.slow
def test_of_three_sides_the_table_is_not_the_wrong_one(sides: Callable[[str], Sides]) -> None:
    """Beside an engine with the function itself llama.cpp's table is far from float64, and right: the faulty side alone is wrong."""
    both = sides("gpt2")
    exact = without_tables(both.faulty.right)
    spoiled = edited(exact, "blk.0.ffn_out", lambda x: x * np.float32(1.01))
    ours, other = (
        replace(both.faulty.dump(RIGHT, both.tokens, points="all", size=1 << 20, steps=steps), path=path)
        for steps, path in ((spoiled, "spoiled.jsonl"), (exact, "exact.jsonl"))
    )
    verdict = three_on((ours, both.ref, other), Options(), both.model)
    assert verdict.first is not None
    assert (verdict.first.checkpoint, verdict.first.wrong) == ("blk.0.ffn_out", (0,))
    assert {point.wrong for point in verdict.points if point.differs} == {(0,)}


class _OursIsTrue:
    """A truth that our side has exactly, where the reference computes two layers coarsely."""

    coarse = frozenset({"blk.1.l_out", "blk.2.l_out"})

    def __init__(self, ours: Arrays) -> None:
        self._ours = ours

    def distances(self, points: Mapping[str, Rows]) -> dict[str, Any]:
        """The NMSE of whole rows."""
        truth = {name: self._ours[name].astype(np.float64) for name in points}
        return {name: ((rows.values - truth[name]) ** 2).sum(1) / (truth[name] ** 2).sum(1) for name, rows in points.items()}

    from_table = distances

    def own_rounding(self, points: Mapping[str, Rows]) -> dict[str, Any]:
        """None."""
        return {name: np.zeros(len(rows)) for name, rows in points.items()}

    spread = own_rounding
    table_spread = own_rounding

    def one_entry(self, points: Mapping[str, Rows]) -> dict[str, Any]:
        """No point is a table's."""
        del points
        return {}

    largest_entry = one_entry


def test_an_exact_engine_is_right_however_coarse_the_reference_is() -> None:
    """Float64 decides also where no error is as small as a table of float16 makes it after few layers."""
    right = random(("embd", "blk.0.l_out", "blk.1.l_out", "blk.2.l_out"))
    ours = {name: values * np.float32(1.07) if name in _OursIsTrue.coarse else values for name, values in right.items()}
    whole = {name: dump(values, slice_size=None) for name, values in (("ours", ours), ("ref", right))}
    assert compare(whole["ours"], whole["ref"]).verdict == "divergence"
    assert compare(whole["ours"], whole["ref"], Options(truth=_OursIsTrue(ours))).verdict == "parity"
    assert compare(whole["ours"], whole["ref"], Options(truth=_OursIsTrue(right))).verdict == "divergence"


def _scattered(rows: NDArray[np.float32], nmse: float) -> NDArray[np.float32]:
    """Rows [R, n] with an error of this size, as rounding makes it: along nothing."""
    return (rows * (1 + np.where(np.arange(rows.shape[1]) % 2, 1, -1) * nmse**0.5)).astype(np.float32)


class _RareEntries(_OursIsTrue):
    """A truth far from both sides, whose table's rarest entries move a row by 1e-6, and the usual ones by nothing."""

    def distances(self, points: Mapping[str, Rows]) -> dict[str, Any]:
        """Far."""
        return {name: np.full(len(rows), 1e-5) for name, rows in points.items()}

    def from_table(self, points: Mapping[str, Rows]) -> dict[str, Any]:
        """Next to nothing."""
        return {name: np.full(len(rows), 1e-13) for name, rows in points.items()}

    def largest_entry(self, points: Mapping[str, Rows]) -> dict[str, Any]:
        """Of each row."""
        return {name: np.full(len(rows), 1e-6) for name, rows in points.items()}


@pytest.mark.parametrize(("positions", "right"), [(1, True), (2, True), (5, False)])
def test_a_rare_entry_of_a_table_is_not_what_most_positions_use(positions: int, right: bool) -> None:
    """An error of one entry's size is the table's at one or two positions of five, and a fault at all of them."""
    ref = random(("embd", "blk.0.l_out", "blk.1.l_out"), 5)
    ours = {name: values.copy() for name, values in ref.items()}
    ours["blk.1.l_out"][:positions] = _scattered(ours["blk.1.l_out"][:positions], 9e-8)
    whole = dump(ours, slice_size=None), dump(ref, slice_size=None)
    assert bool(compare(*whole, Options(compute="f32", truth=_RareEntries(ref)))) is right


class _Amplifies(_OursIsTrue):
    """A truth whose float32 and whose noise are as far off at every record as is said."""

    coarse = frozenset()

    def __init__(self, ours: Arrays, float32: float, noise: float) -> None:
        super().__init__(ours)
        self._float32, self._noise = float32, noise

    def own_rounding(self, points: Mapping[str, Rows]) -> dict[str, Any]:
        """Float32's own distance."""
        return {name: np.full(len(rows), self._float32) for name, rows in points.items()}

    def spread(self, points: Mapping[str, Rows]) -> dict[str, Any]:
        """The noise's."""
        return {name: np.full(len(rows), self._noise) for name, rows in points.items()}


@pytest.mark.parametrize(
    ("error", "float32", "noise", "right"),
    [(8e-7, 8e-8, 9e-6, True), (8e-7, 1e-9, 9e-6, False), (8e-7, 8e-8, 1e-7, False), (2e-6, 8e-8, 9e-6, False)],
)
def test_rounding_that_is_amplified_twice_over(error: float, float32: float, noise: float, right: bool) -> None:
    """An error between 1e-7 and 1e-6 is rounding if float32 and noise are both that far off, and never beyond."""
    ref = random(("embd", "blk.0.l_out"))
    ours = {"embd": ref["embd"], "blk.0.l_out": _scattered(ref["blk.0.l_out"], error)}
    truth = _Amplifies(ref, float32, noise)
    whole = dump(ours, slice_size=None), dump(ref, slice_size=None)
    assert bool(compare(*whole, Options(compute="f32", truth=truth))) is right


@pytest.mark.parametrize(("float32", "right"), [(6e-8, True), (6e-9, False)])
def test_rounding_that_float32_shows_and_noise_does_not(float32: float, right: bool) -> None:
    """An error under 1e-7 is rounding if float32's own distance from the truth is of its size, though noise that was tried reaches less."""
    ref = random(("embd", "blk.0.l_out"))
    ours = {"embd": ref["embd"], "blk.0.l_out": _scattered(ref["blk.0.l_out"], 8e-8)}
    whole = dump(ours, slice_size=None), dump(ref, slice_size=None)
    assert bool(compare(*whole, Options(compute="f32", truth=_Amplifies(ref, float32, 1e-10)))) is right


@pytest.mark.parametrize(
    ("op", "right"), [("UNARY:GELU", True), ("UNARY:GELU_QUICK", True), ("UNARY:SILU", False), ("UNARY", False)]
)
def test_the_header_says_which_function_is_looked_up(op: str, right: bool) -> None:
    """An error of 1e-7 after a node without a telling name is the table's where the header says GELU, and a divergence elsewhere."""
    dataflow = {
        "": {"embd": ["GET_ROWS", [], ["token_embd.weight"]]},
        "0": {"gated": [op, ["embd"], []], "l_out": ["MUL_MAT", [".gated"], [".proj.weight"]]},
    }
    ref = random(("embd", "blk.0.l_out"))
    ours = {"embd": ref["embd"], "blk.0.l_out": _scattered(ref["blk.0.l_out"], 9e-8)}
    verdict = compare(dump(ours), dump(ref, header=replace(HEADER, dataflow=dataflow)), Options(compute="f32"))
    assert bool(verdict) == right


def test_an_erf_is_not_looked_up() -> None:
    """What is said decides; the name only where nothing is said, as in headers of older versions."""
    assert Computation("GLU", function="GEGLU").looked_up("blk.0.ffn_act")
    assert not Computation("GLU", function="GEGLU_ERF").looked_up("blk.0.ffn_geglu")
    assert Computation("GLU").looked_up("blk.0.ffn_geglu")
    assert not Computation("GLU").looked_up("blk.0.ffn_swiglu")


def halves(kind: str, values: np.ndarray) -> np.ndarray:
    """Queries and keys with the halves of a head as neighbours."""
    if kind not in ("q", "k", "q_rope", "k_rope"):
        return values
    heads = values.reshape(len(values), -1, 2, 16)
    return np.ascontiguousarray(heads.swapaxes(2, 3).reshape(values.shape))


@pytest.mark.parametrize("size", [16, 1 << 20])
def test_another_layout_before_a_norm_of_heads_is_no_fault(size: int, sides: Callable[[str], Sides]) -> None:
    """Q and K as neighbours in front of their norms, all that is made from them right: the records are of another layout."""
    verdict = sides("qwen3").judged(size, change=halves)
    assert verdict
    assert {fault.kind for fault in verdict.record_faults} == {"layout"}
    assert {"blk.0.q", "blk.0.k", "blk.0.q_rope"} <= {fault.checkpoint for fault in verdict.record_faults}


@pytest.mark.slow
def test_what_a_norm_removes_is_not_acquitted_by_it(sides: Callable[[str], Sides]) -> None:
    """A constant that is added in front of LayerNorm, queries that are doubled in front of their norm: a divergence at the operation."""
    for recipe, name, change in (
        ("falcon", "blk.0.attn_out", lambda x: x + np.float32(1e-3)),
        ("qwen3", "blk.1.q", lambda x: x * np.float32(2)),
    ):
        both = sides(recipe)
        verdict = both.judged(1 << 20, steps=edited(list(both.faulty.right), name, change))
        assert verdict.first_divergence is not None
        assert verdict.first_divergence.checkpoint == name


def test_a_factor_that_a_norm_removes_blames_no_operation(sides: Callable[[str], Sides]) -> None:
    """Keys twice as large, and all that is made of them after their norm right: the record, or an operation that the norm hides."""
    verdict = sides("qwen3").judged(16, change=lambda kind, values: values * np.float32(2) if kind == "k" else values)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.0.k"
    assert "k_norm, computed from it, agree" in verdict.operation
    assert verdict.pattern is not None
    assert "2 times" in verdict.pattern.sentence
    assert "differ" not in verdict.pattern.sentence
