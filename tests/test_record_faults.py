"""The record or the operation: a right engine that records something else is not accused, a wrong one is not acquitted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from planted import TOKENS, Faulty, Planted
from recorded import F32, Change, changed, kinds, only

from checkpoints.answers.diff import OTHERWISE, Verdict
from checkpoints.mapped import renamed
from checkpoints.mapping import read_mapping
from checkpoints.points import parse
from checkpoints.reading.reader import read
from checkpoints.record import Dump, Rows
from checkpoints.summary import summarise
from engine.replay.precision import rounded
from parity.diff.compare import Options, compare
from parity.models.embedded import path
from reference.client import Reference
from reference.jobs import DumpJob

HEAD = 32


def neighbours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Heads whose halves lie interleaved: pairs side by side, as Meta's files have them."""
    count, width = values.shape
    return values.reshape(count, width // HEAD, 2, HEAD // 2).swapaxes(2, 3).reshape(count, width)


def faults(verdict: Verdict) -> set[tuple[str, str]]:
    """(kind of point, kind of fault) of all record faults."""
    return {(parse(fault.checkpoint).kind, fault.kind) for fault in verdict.record_faults}


@pytest.mark.parametrize("size", [10, 16])
def test_rows_of_a_cache_in_another_order_are_no_fault(right: Dump, ref: Dump, size: int) -> None:
    """Few values a row of keys in another order, and of the cache's rows that attention read, all bare: the scores agree, so nothing is
    wrong; where a score of the first head differs, too, it is.
    """
    ours = changed(right, neighbours, kinds("q", "k", "q_rope", "k_rope"), size, bare=True)
    for name, rows in ours.points.items():
        if parse(name).kind in ("k_read", "v_read", "kq", "kq_soft_max"):  # as many of the first values, of rows that grow
            values = neighbours(rows.values) if parse(name).kind == "k_read" else rows.values
            few = replace(rows, values=values[:, :size], counts=np.minimum(rows.counts, size))
            ours.points[name] = replace(few, sketch=None, stats={}, shapes=((),) * len(few))
    verdict = compare(ours, ref, F32)
    assert verdict
    assert {kind for kind, _ in faults(verdict)} == {"q", "k", "q_rope", "k_rope", "k_read"}
    scores = ours.points["blk.0.kq"]
    wrong = replace(scores, values=scores.values * np.float32(1.001))
    first = compare(replace(ours, points={**ours.points, "blk.0.kq": wrong}), ref, F32).first_divergence
    assert first is not None
    assert first.layer == 0


@pytest.mark.parametrize("how", ["whole", "sketched", "bare"])
def test_another_order_of_the_elements_is_named(right: Dump, ref: Dump, tmp_path: Path, how: str) -> None:
    """Q and K as neighbours where llama.cpp has halves: parity, and the `--map` line that says so makes every record agree."""
    size = None if how == "whole" else 16
    wanted = kinds("q", "k", "q_rope", "k_rope")
    ours = changed(right, neighbours, wanted, size, bare=how == "bare")
    verdict = compare(ours, ref, F32)
    assert verdict
    assert faults(verdict) == {(kind, "layout") for kind in ("q", "k", "q_rope", "k_rope")}
    assert all("neighbours where llama.cpp has halves" in fault.sentence for fault in verdict.record_faults)
    assert {point.status for point in verdict.points if wanted(point.checkpoint)} == {OTHERWISE}
    assert not compare(ours, ref, replace(F32, strict=True))
    lines = "\n".join(sorted({fault.map for fault in verdict.record_faults}))
    (tmp_path / "names.toml").write_text(f"[names]\n{lines}\n")
    mapping = read_mapping(tmp_path / "names.toml")
    if how == "bare":  # without the row's length a slice keeps its own: head_size is in the line
        assert all("head_size = 32" in line for line in lines.splitlines())
    settled = compare(renamed(mapping, ours), ref, F32)
    assert settled
    assert settled.record_faults == ()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("kqv_out", lambda x: x.reshape(len(x), -1, HEAD).swapaxes(1, 2).reshape(len(x), -1), "interleaved"),
        ("q", lambda x: x.reshape(len(x), -1, HEAD).swapaxes(0, 1).reshape(len(x), -1), "heads first"),
        ("q", lambda x: x.reshape(len(x), 2, -1, HEAD).swapaxes(1, 2).reshape(len(x), -1), "another order"),
        ("ffn_gate", lambda x: x / (1 + np.exp(-x)), "captured after the activation"),
        ("attn_norm", lambda x: x * np.float32(0.25), "0.25 times"),
    ],
)
def test_other_layouts_and_moments(right: Dump, ref: Dump, kind: str, change: Change, message: str) -> None:
    """Heads interleaved, heads first, groups of heads, before a scale, after an activation: each is told, none is a divergence."""
    whole = replace(ref, points=ref.points)
    verdict = compare(changed(right, change, kinds(kind), None), changed_reference(right, whole), F32)
    assert verdict, verdict.operation
    assert {name for name, _ in faults(verdict)} == {kind}
    assert all(message in fault.sentence for fault in verdict.record_faults)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_another_order_is_named_in_lower_arithmetic(kind: str) -> None:
    """Sixteen values of Q and K as neighbours, with statistics of whole rows that rounding moved: the order is named, but not where
    the others are a tenth too large.
    """
    engine = Faulty(path())
    wanted = kinds("q", "k", "q_rope", "k_rope")
    ref = changed(engine.dump(Planted(()), TOKENS, points="blk.0.*", size=4096), lambda x: x, wanted, None)
    lower = engine.dump(Planted(()), TOKENS, points="blk.0.*", size=4096, steps=rounded(engine.right, kind, storage=True))
    stated = Options(compute=kind)
    ours = replace(changed(lower, neighbours, wanted, 16), header=None)
    verdict = compare(ours, ref, stated)
    assert verdict, verdict.operation
    assert faults(verdict) == {(name, "layout") for name in ("q", "k", "q_rope", "k_rope")}
    rows = ours.points["blk.0.q"]
    larger = replace(rows, stats={**rows.stats, "l2": rows.stats["l2"] * 1.1})
    assert ("q", "layout") not in faults(compare(replace(ours, points={**ours.points, "blk.0.q": larger}), ref, stated))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_one_row_after_an_activation_is_told_in_lower_arithmetic(kind: str) -> None:
    """A prompt of one token: lower arithmetic may leave one row a factor of its own, but makes no SiLU of it."""
    engine = Faulty(path())
    alone = engine.dump(Planted(()), TOKENS[:1], points="blk.0.ffn_*", size=4096)
    lower = engine.dump(
        Planted(()), TOKENS[:1], points="blk.0.ffn_*", size=4096, steps=rounded(engine.right, kind, storage=True)
    )
    ours = changed(lower, lambda x: x / (1 + np.exp(-x)), kinds("ffn_gate"), None)
    verdict = compare(replace(ours, header=None), alone, Options(compute=kind))
    assert verdict, verdict.operation
    assert faults(verdict) == {("ffn_gate", "moment")}


def changed_reference(right: Dump, ref: Dump) -> Dump:
    """The reference with whole rows: ours stand for them, since the two agree to rounding."""
    return replace(ref, points={name: right.points[name] for name in ref.points if name in right.points})


def spoilt(dump: Dump, names: Callable[[str], bool], size: float = 0.1) -> Dump:
    """Wrong at these points: the effect of a fault that is somewhere before."""
    rng = np.random.default_rng(0)
    plain = {name: rows for name, rows in dump.points.items() if len(set(rows.shapes)) == 1}
    return changed(
        replace(dump, points=plain), lambda x: (x * (1 + size * rng.standard_normal(x.shape))).astype(np.float32), names, None
    )


def captured(dump: Dump, source: str, *names: str) -> Dump:
    """A dump that shows one point's values under other names."""
    return replace(
        dump,
        points={
            name: replace(dump.points[source], point=name) if name in names else rows for name, rows in dump.points.items()
        },
    )


FEW = ("embd", "blk.5.l_out", "blk.23.l_out", "output_norm", "logits")


def test_one_vector_and_right_logits_is_the_capture(right: Dump, ref: Dump) -> None:
    """embd = layer 5 = layer 23 while the logits agree: captured late, and the engine is right."""
    verdict = compare(captured(only(right, *FEW), "blk.23.l_out", "embd", "blk.5.l_out"), ref, F32)
    assert verdict
    assert [fault.checkpoint for fault in verdict.record_faults] == ["embd", "blk.5.l_out"]
    assert all(fault.kind == "moment" and "blk.23.l_out" in fault.sentence for fault in verdict.record_faults)
    assert verdict.worst is not None
    assert verdict.worst.of_limit < 1


def test_experts_hide_no_capture_of_the_embedding(small_model: Callable[..., Path], reference: Reference) -> None:
    """One buffer in a right mixture of experts: whatever the experts choose, no embedding is what a layer computes."""
    model = small_model("mixtral")
    engine = Faulty(model, reference.graph(model))
    dump = engine.dump(Planted(()), TOKENS, bare=False)
    last = [name for name in dump.points if name.endswith("l_out")][-1]
    verdict = compare(captured(dump, last, "embd", "blk.0.l_out"), dump, F32)
    assert verdict
    assert [fault.checkpoint for fault in verdict.record_faults] == ["embd", "blk.0.l_out"]


def test_one_vector_and_wrong_logits_is_a_divergence(right: Dump, ref: Dump) -> None:
    """The same with wrong logits: a divergence that says both readings; where the embedding is right the layers do nothing."""
    wrong = spoilt(only(right, *FEW), lambda name: name in ("blk.23.l_out", "output_norm", "logits"))
    verdict = compare(captured(wrong, "blk.23.l_out", "embd", "blk.5.l_out"), ref, F32)
    assert not verdict
    assert verdict.pattern is not None
    assert verdict.pattern.code == "same-vector"
    assert "captured from one buffer" in verdict.pattern.sentence
    idle = compare(captured(wrong, "embd", "blk.5.l_out", "blk.23.l_out"), ref, F32)
    assert idle.pattern is not None
    assert idle.pattern.code == "no-op"
    assert idle.pattern.sentence.startswith("blk.5.l_out is embd, unchanged")


def test_a_view_is_no_buffer_that_was_captured_twice(right: Dump, ref: Dump) -> None:
    """Two points with one vector on both sides are one value by the model: where it is wrong, the capture is not suspected."""
    point, view = "blk.3.ffn_out", "blk.3.ffn_view"
    order = list(ref.points)
    wrong = spoilt(right, lambda name: name in order and order.index(name) >= order.index(point))
    ours, theirs = (
        replace(dump, points={**dump.points, view: replace(dump.points[point], point=view)}) for dump in (wrong, ref)
    )
    verdict = compare(ours, theirs, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == point
    assert verdict.pattern is None or verdict.pattern.code not in ("same-vector", "no-op")
    other = {**theirs.points, view: replace(ref.points["embd"], point=view)}
    doubled = compare(ours, replace(theirs, points=other), F32)
    assert doubled.pattern is not None
    assert doubled.pattern.code == "same-vector"


@pytest.mark.parametrize(
    ("point", "unchanged", "message"),
    [
        ("blk.3.ffn_inp", "blk.3.attn_out", "the addition of blk.2.l_out does nothing"),
        ("blk.3.l_out", "blk.3.ffn_out", "the addition of blk.3.ffn_inp does nothing"),
        ("output_norm", "blk.23.l_out", "the norm does nothing"),
        ("blk.4.q_rope", "blk.4.q", "RoPE does nothing"),
    ],
)
def test_an_operation_that_does_nothing(right: Dump, ref: Dump, point: str, unchanged: str, message: str) -> None:
    """A missing residual, final norm or rotation, captured honestly: what follows differs, and the operation is named."""
    order = list(ref.points)
    wrong = spoilt(right, lambda name: name in order and order.index(name) > order.index(point))
    verdict = compare(captured(wrong, unchanged, point), ref, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == point
    assert "this operation is wrong" in verdict.operation
    assert verdict.pattern is not None
    assert (verdict.pattern.code, verdict.next) == ("no-op", "")
    assert message in verdict.pattern.sentence


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("q", lambda x: x * np.float32(1.002)),  # a product scaled a little: no scale that anything explains
        ("attn_out", lambda x: x * np.float32(3.0)),  # small beside the residual stream, and wrong
        ("k", lambda x: np.roll(x, 1, axis=1)),
        ("ffn_out", lambda x: -x),
    ],
)
def test_a_wrong_engine_is_not_acquitted(right: Dump, ref: Dump, kind: str, change: Change) -> None:
    """A wrong operation of one layer whose effect is in everything below is a divergence at its place, however it looks."""
    point = f"blk.2.{kind}"
    order = list(ref.points)
    wrong = spoilt(right, lambda name: name in order and order.index(name) > order.index(point), 1e-3)
    verdict = compare(changed(wrong, change, lambda name: name == point), ref, F32)
    assert not verdict
    assert verdict.record_faults == ()


def test_a_small_error_beside_a_large_residual_is_no_record_fault(right: Dump, ref: Dump) -> None:
    """What is added and wrong by a part in a thousand hides below the limit of the sum: that does not acquit it."""
    names = ("blk.9.attn_out", "blk.9.ffn_inp", "blk.10.l_out", "logits")
    added = right.points["blk.9.attn_out"].values * np.float32(2e-5)
    ours = changed(only(right, *names), lambda x: x + added, lambda name: name in names[:2], None)
    energy = [float(np.sum(right.points[name].values.astype(np.float64) ** 2)) for name in names[:2]]
    assert energy[0] < energy[1] / 10
    verdict = compare(ours, ref, F32)
    assert not verdict
    assert verdict.record_faults == ()


def test_scores_that_a_soft_max_may_hide_stay_open(right: Dump, ref: Dump) -> None:
    """Queries that are wrong in no way that a layout explains, while attention agrees: no acquittal, and both readings are said."""
    ours = changed(only(right, "blk.0.q_rope", "blk.0.kqv_out", "blk.0.l_out", "logits"), lambda x: x**3, kinds("q_rope"))
    verdict = compare(ours, ref, F32)
    assert not verdict
    assert "the record has another layout, moment or name, or later operations hide the error" in verdict.operation


@pytest.mark.parametrize("factor", [1.001, 0.97])
def test_a_scaled_record_beside_a_norm_is_acquitted_by_the_sum(right: Dump, ref: Dump, factor: float) -> None:
    """What a norm makes of a layer's output says nothing of a factor; the next residual sum, which agrees, does."""
    ours = changed(right, lambda x: x * np.float32(factor), lambda name: name == "blk.5.l_out")
    verdict = compare(ours, ref, F32)
    assert verdict
    assert [fault.checkpoint for fault in verdict.record_faults] == ["blk.5.l_out"]
    assert not compare(only(ours, "blk.5.l_out", "blk.6.attn_norm"), ref, F32)


def half(rows: Rows) -> Rows:
    return replace(rows, values=rows.values.astype(np.float16).astype(np.float32), stats={}, sketch=None)


@pytest.mark.slow
def test_a_layer_that_is_kept_in_half_precision_is_recorded_so(
    reference: Reference, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """All records of a layer are rounded, or of a dump: scores' rows, which grow, and single numbers, too. No operation is wrong."""
    model = small_model("qwen3moe")
    reference.dump(DumpJob(model, tmp_path / "ref.jsonl", (5, 99, 7, 300), points="all", slice_size=4096))
    ref = read(tmp_path / "ref.jsonl")
    engine = Faulty(model, reference.graph(model))
    right = engine.dump(Planted(()), (5, 99, 7, 300), points="all", size=4096, bare=False)
    layer = {name: half(rows) for name, rows in right.points.items() if name.startswith("blk.1.") and not name.endswith("topk")}
    verdict = compare(replace(right, points=right.points | layer), ref, F32)
    assert verdict
    assert {fault.kind for fault in verdict.record_faults} == {"type"}
    assert {fault.checkpoint for fault in verdict.record_faults} == layer.keys()
    every = {name: rows if name.endswith("topk") else half(rows) for name, rows in right.points.items()}
    assert compare(replace(right, points=every), ref, F32)


@pytest.mark.slow
def test_a_layer_that_is_computed_in_half_precision_is_wrong(faulty: Faulty, ref: Dump) -> None:
    """An engine that keeps all values of a layer in F16 and says float32: what follows shows it."""
    steps = [
        replace(step, op=lambda *x, op=step.op, **p: op(*x, **p).astype(np.float16).astype(np.float32))
        if step.makes.startswith("blk.1.")
        else step
        for step in faulty.right
    ]
    verdict = compare(faulty.dump(Planted(()), TOKENS, points="all", size=4096, bare=False, steps=steps), ref, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.1.attn_norm"


def test_a_state_is_no_missing_reader(reference: Reference, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """One position of what a recurrence reads was recorded wrong: its state, which is there once a pass, cannot tell; its output does."""
    model, tokens = small_model("jamba"), (5, 99, 7, 300)
    reference.dump(DumpJob(model, tmp_path / "ref.jsonl", tokens, points="blk.0.*", slice_size=4096))
    right = Faulty(model, reference.graph(model)).dump(Planted(()), tokens, points="blk.0.*", size=4096, bare=False)
    name = "blk.0.ssm_dt.2"
    values = right.points[name].values.copy()
    values[1] *= np.float32(1.5)
    spoilt = summarise(name, values, right.points[name].token_idx, slice_size=4096)
    verdict = compare(replace(right, points={**right.points, name: spoilt}), read(tmp_path / "ref.jsonl"), F32)
    assert verdict
    assert [fault.checkpoint for fault in verdict.record_faults] == [name]
