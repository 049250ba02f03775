"""An engine that does not say in which arithmetic it computes is judged in the one that its products show together."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from checkpoints.answers.isolate import NOT_OBSERVABLE, PROVEN, WRONG, Isolation, Operation
from checkpoints.jsonl import write
from checkpoints.points import parse
from engine.graph import Step
from engine.replay.precision import rounded
from engine.replay.proof import proof_steps
from engine.replay.wide import is_looked_up, without_tables
from parity.isolate.arithmetic import SPREAD, shown_limit
from parity.isolate.isolate import LIMIT, IsolateRequest, isolate
from parity.isolate.judged_layers import LAYER, eliminated
from parity.isolate.unrecorded import attends
from reference.client import Reference

_MOST = 3e-4


def judged(engine: Faulty, reference: Reference, folder: Path, steps: list[Step], compute: str = "") -> Isolation:
    """What is said of an engine's whole values, under a header that states this arithmetic."""
    tokens = tokens_of(engine.model, 6, seed=1)
    dump = engine.dump(Planted(()), tokens, points="all", size=1 << 20, bare=False, steps=steps)
    assert dump.header is not None
    path = folder / "ours.jsonl"
    write(replace(dump, header=replace(dump.header, compute=compute, source="an engine", mode="")), path, dump.header)
    return isolate(IsolateRequest(engine.model, tokens=tokens, dump=path, mode="exact"), reference)


def scaled(steps: list[Step], name: str, by: float) -> list[Step]:
    """The steps with one result multiplied."""

    def changed(step: Step) -> Step:
        return replace(step, op=lambda *inputs, **params: (step.op(*inputs, **params) * by).astype(np.float32))

    return [changed(step) if step.makes == name else step for step in steps]


def operation(name: str, nmse: float, weight: str = "F32") -> Operation:
    """A product in layer 0."""
    return Operation(name, 0, WRONG if nmse > LIMIT else PROVEN, nmse, weight=weight)


def limit(*operations: Operation, rounding: dict[str, float] | None = None) -> float | None:
    """The limit that products show."""
    return shown_limit(operations, {item.name for item in operations}, rounding or {}, LIMIT, _MOST)


def test_lower_arithmetic_shows_in_most_products() -> None:
    """One product of four that is off is a fault, all four are an arithmetic whose size sets the limit; one alone says nothing."""
    right = [operation(name, 1e-13) for name in "qkv"]
    assert limit(*right, operation("o", 1e-7)) == LIMIT
    off = [operation(name, 1e-7) for name in "qkvo"]
    assert limit(*off) == pytest.approx(SPREAD * 1e-7)
    assert limit(*off, operation("down", 1e-3)) == pytest.approx(SPREAD * 1e-7)
    assert limit(off[0]) is None
    assert limit(*right) == LIMIT


def test_products_that_round_as_ggml_does_are_another_question() -> None:
    """Where products of a type round activations to 8 bits, one that does not is wrong; those of another type are undecided."""
    eight = [operation(name, 1e-13, "Q8_0") for name in "qkv"]
    rounding = {item.name: 2e-5 for item in eight}
    assert limit(*eight, operation("o", 1e-5, "Q8_0"), rounding=rounding) == LIMIT
    assert limit(*eight, operation("router", 1e-5), rounding=rounding) is None
    half = [operation(name, 1e-13, "F16") for name in "qkv"]
    assert limit(*half, Operation("kq", 0, WRONG, 4e-7), rounding={item.name: 1e-7 for item in half}) == pytest.approx(
        SPREAD * 1e-7
    )


@pytest.mark.parametrize(
    ("size", "status"), [(3.9e-4, NOT_OBSERVABLE), (4.2e-3, NOT_OBSERVABLE), (4.3e-3, WRONG), (6e-3, WRONG)]
)
def test_a_layer_is_undecided_while_its_error_is_that_of_an_undecided_product(size: float, status: str) -> None:
    """A layer in which one product is left undecided is wrong if it is further off than rounding of that size can make it."""
    open_ = replace(operation("ssm_out", 1.7e-4), status=NOT_OBSERVABLE)
    layer = Operation(LAYER, 0, WRONG, size, reason="another output")
    (judged_layer,) = eliminated([operation("q", 1e-13), open_], [layer])
    assert judged_layer.status == status
    assert "ssm_out" in judged_layer.reason
    (beside_a_fault,) = eliminated([operation("q", 1e-4), open_], [layer])
    assert beside_a_fault.status == WRONG


def test_attention_and_norms_alone_show_no_arithmetic() -> None:
    """If no product was recorded, or all of them round to 8 bits, a small error elsewhere may be that of a lower type."""
    attention = Operation("kqv_out", 0, WRONG, 4e-7)
    assert shown_limit([attention], (), {}, LIMIT, _MOST) is None
    eight = [operation(name, 1e-13, "Q8_0") for name in "qkv"]
    products, rounding = {item.name for item in eight}, {item.name: 2e-5 for item in eight}
    assert shown_limit([*eight, attention], products, rounding, LIMIT, _MOST) is None
    assert shown_limit([*eight, attention], products, {}, LIMIT, _MOST) == LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["qwen3", "gemma", "granitemoe"])
def test_a_small_fault_is_named_in_undeclared_float32_and_right_engines_are_not_blamed(
    recipe: str, small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """A result 2e-4 too large is wrong, and nothing else; F16, BF16 and an exact GELU are right, undeclared and declared; in undeclared
    F16 a result 1 % too large is wrong.
    """
    model = small_model(recipe, kind="f32")
    engine = Faulty(model, reference.graph(model))

    def wrong(steps: list[Step], **stated: Any) -> set[str]:
        isolation = judged(engine, reference, tmp_path, steps, **stated)
        return {item.name for item in isolation.operations if item.status == WRONG} | set(isolation.findings)

    assert wrong(scaled(engine.right, "blk.1.kqv_out", 1.0002)) == {"blk.1.kqv_out"}
    assert not wrong(without_tables(engine.right), compute="f32")
    for kind in ("f16", "bf16"):
        for storage in (False, True):
            lower = rounded(engine.right, kind, storage=storage)
            assert not wrong(lower)
            assert not wrong(lower, compute=kind)
    assert wrong(scaled(rounded(engine.right, "f16", storage=False), "blk.1.kqv_out", 1.01)) == {"blk.1.kqv_out"}


def test_too_few_products_leave_the_arithmetic_open(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """If the logits alone were recorded with their input, F16 there is not observable, with a line that says what settles it."""
    model = small_model("qwen3", kind="f32")
    engine = Faulty(model, reference.graph(model))
    tokens = tokens_of(model, 6, seed=1)
    steps = rounded(engine.right, "f16", storage=False)
    dump = engine.dump(Planted(()), tokens, points="output_norm,logits", size=1 << 20, bare=False, steps=steps)
    assert dump.header is not None
    path = tmp_path / "ours.jsonl"
    write(replace(dump, header=replace(dump.header, compute="", source="an engine", mode="")), path, dump.header)
    stated = isolate(IsolateRequest(model, tokens=tokens, dump=path, mode="exact", windows=False, compute="f32"), reference)
    assert [item.name for item in stated.wrong] == ["logits"]
    isolation = isolate(IsolateRequest(model, tokens=tokens, dump=path, mode="exact", windows=False), reference)
    logits = next(item for item in isolation.operations if item.name == "logits")
    assert logits.status == NOT_OBSERVABLE
    assert "--compute f32" in logits.reason


@pytest.mark.parametrize(
    ("recipe", "other", "point"),
    [
        ("qwen3", lambda right: proof_steps(right, native=False, kv_type="f16"), "kqv_out"),
        pytest.param("gemma", without_tables, "ffn_out", marks=pytest.mark.slow),
    ],
    ids=["cache of F16", "exact GELU"],
)
def test_what_is_not_stated_acts_through_points_that_were_not_recorded(
    recipe: str,
    other: Callable[[Sequence[Step]], list[Step]],
    point: str,
    small_model: Callable[..., Path],
    reference: Reference,
    tmp_path: Path,
) -> None:
    """A cache of F16 after unrecorded scores and an exact GELU that was not recorded are right; a result 0.1 % too large is not."""
    model = small_model(recipe, kind="f32")
    engine = Faulty(model, reference.graph(model))
    tokens = tokens_of(model, 6, seed=1)
    right = other(engine.right)
    unrecorded = {
        step.makes
        for step in engine.right
        if (attends(parse(step.makes).kind) and parse(step.makes).kind != point) or is_looked_up(step)
    }
    for steps, wrong in ((right, []), (scaled(right, f"blk.1.{point}", 1.001), [f"blk.1.{point}"])):
        dump = engine.dump(Planted(()), tokens, points="all", size=1 << 20, bare=False, steps=steps)
        assert dump.header is not None
        points = {name: rows for name, rows in dump.points.items() if name not in unrecorded}
        header = replace(dump.header, compute="", kv_type="", source="an engine", mode="")
        path = tmp_path / "ours.jsonl"
        write(replace(dump, points=points, header=header), path, header)
        isolation = isolate(IsolateRequest(model, tokens=tokens, dump=path, mode="exact", windows=False), reference)
        assert [item.name for item in isolation.wrong] == wrong
        assert any(item.operation == point and item.status == PROVEN for item in isolation.operations)


def test_scores_of_an_encoder_are_whole_up_to_its_last_position_alone(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """Records that hold scores up to their own position blame nothing in an encoder, whose positions see later ones."""
    model = small_model("t5encoder", kind="f32")
    engine = Faulty(model, reference.graph(model))
    isolation = judged(engine, reference, tmp_path, engine.right)
    assert not isolation.wrong
    assert any(item.operation == "kqv_out" for item in isolation.operations)
