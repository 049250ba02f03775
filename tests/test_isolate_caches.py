"""An engine that states the type of its cache is judged with that type, whichever it is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from checkpoints.answers.isolate import NOT_OBSERVABLE, PROVEN, WRONG, Isolation, Operation
from checkpoints.jsonl import write
from checkpoints.points import parse
from engine.graph import History, Step
from engine.replay.kept import kept
from engine.replay.precision import rounded
from engine.replay.proof import proof_steps
from parity.isolate.isolate import IsolateRequest, isolate
from parity.isolate.judging import Definition, Record
from parity.isolate.operation import Isolator
from parity.isolate.suspicions import of_stated_cache, proven_within
from reference.client import Reference

_SHOWN = ("k_read", "v_read")  # what the cache gave: most engines cannot record it


def judged(engine: Faulty, reference: Reference, path: Path, steps: list[Step], kv_type: str, *, shown: bool) -> Isolation:
    """What is said of the whole values of an engine that states float32 and the type of its cache."""
    tokens = tokens_of(engine.model, 6, seed=1)
    dump = engine.dump(Planted(()), tokens, points="all", size=1 << 20, bare=False, steps=steps)
    assert dump.header is not None
    header = replace(dump.header, compute="f32", kv_type=kv_type, source="an engine", mode="exact")
    points = {name: rows for name, rows in dump.points.items() if shown or parse(name).kind not in _SHOWN}
    write(replace(dump, header=header, points=points), path, header)
    return isolate(IsolateRequest(engine.model, tokens=tokens, dump=path), reference)


def scaled(steps: list[Step], name: str) -> list[Step]:
    """The steps with one result 0.1 % too large."""
    return [
        replace(step, op=lambda *x, op=step.op, **params: (op(*x, **params) * 1.001).astype(np.float32))
        if step.makes == name
        else step
        for step in steps
    ]


@pytest.mark.parametrize("shown", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("kind", ["f16", "bf16", pytest.param("q8_0", marks=pytest.mark.slow)])
def test_a_cache_of_a_stated_type(
    kind: str, shown: bool, small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """Scores of a cache of F16, BF16 or Q8_0 are proven, multiplied in float32 or as ggml does; 0.1 % too large they are wrong, alone."""
    model = small_model("qwen3", kind="f32")
    engine = Faulty(model, reference.graph(model))
    ways = [kept(engine.right, f"{kind.removesuffix('_0')} cache"), proof_steps(engine.right, native=False, kv_type=kind)]
    for steps in ways:
        answer = judged(engine, reference, tmp_path / "ours.jsonl", list(steps), kind, shown=shown)
        assert not answer.wrong
        assert answer.kv_type == kind
        assert {item.status for item in answer.operations if item.operation in ("kq", "kqv_out")} == {PROVEN}
        answer = judged(engine, reference, tmp_path / "ours.jsonl", scaled(list(steps), "blk.1.kq"), kind, shown=shown)
        assert {item.name for item in answer.wrong} - {"blk.1.layer"} == {"blk.1.kq"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["qwen3", "deepseek2"])
@pytest.mark.parametrize("shown", [True, False])
def test_a_cache_that_nothing_states_beside_stated_float32(
    recipe: str, shown: bool, small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """A cache of F16 or BF16 is neither wrong nor proven; scores 0.1 % too large, and a norm that is rounded to F16, are wrong, alone."""
    model = small_model(recipe, kind="f32")
    engine = Faulty(model, reference.graph(model))
    ways = [kept(engine.right, "f16 cache"), kept(engine.right, "bf16 cache")]
    as_ggml = [proof_steps(engine.right, native=False, kv_type="f16")] if recipe == "qwen3" else []  # an engine that runs so
    for steps in (*ways, *as_ggml):
        answer = judged(engine, reference, tmp_path / "ours.jsonl", list(steps), "", shown=shown)
        assert not answer.wrong
        assert any("the cache keeps keys and values in" in item.reason for item in answer.operations)
    answer = judged(engine, reference, tmp_path / "ours.jsonl", scaled(ways[0], "blk.1.kq"), "", shown=shown)
    assert {item.name for item in answer.wrong} == {"blk.1.kq"}
    half = rounded(engine.right, "f16", storage=True)
    steps = [low if step.makes == "blk.1.ffn_norm" else step for step, low in zip(ways[0], half, strict=True)]
    answer = judged(engine, reference, tmp_path / "ours.jsonl", steps, "", shown=shown)
    assert {item.name for item in answer.wrong} - {"blk.1.layer"} == {"blk.1.ffn_norm"}


@pytest.mark.parametrize("kind", ["q4_0", "int8"])
def test_a_cache_whose_rounding_is_not_known(kind: str) -> None:
    """Noise of the size of a quantised cache is undecided where it is read, as long as none that reads it follows exactly; a value times a
    factor, and the same noise where no cache is read, are wrong.
    """
    steps = [
        Step("blk.0.k_read", np.copy, (History("k"),)),
        Step("blk.1.k_read", np.copy, (History("k"),)),
        Step("blk.0.q", np.copy, ("x",)),
    ]
    isolator = Isolator([Definition(steps)], None, 1e-10)  # type: ignore[arg-type]

    def said(nmse: float, status: str, *, scaled: bool = False) -> list[str]:
        wrong = [Operation("k_read", 0, WRONG, 1e-4), Operation("q", 0, WRONG, 1e-4), Operation("k_read", 1, status, nmse)]
        for item in wrong:
            isolator.records[item.name] = Record(item.nmse or 0.0, wrong=item.status == WRONG, scaled=scaled)
        return [item.status for item in of_stated_cache(wrong, [isolator], kind)]

    assert said(1e-4, WRONG) == [NOT_OBSERVABLE, WRONG, NOT_OBSERVABLE]
    assert said(1e-13, PROVEN) == [WRONG, WRONG, PROVEN]
    assert said(0.1, WRONG) == [NOT_OBSERVABLE, WRONG, WRONG]
    assert said(1e-4, WRONG, scaled=True) == [WRONG, WRONG, WRONG]


def test_a_layer_is_not_proven_by_the_room_of_a_cache() -> None:
    """Beside llama.cpp's cache of F32 a layer that is off by what a cache of 8 bits costs is undecided; one within the limit is proven."""
    layers = [Operation("layer", 0, PROVEN, 1e-3), Operation("layer", 1, PROVEN, 1e-12), Operation("layer", 2, WRONG, 0.1)]
    assert [item.status for item in proven_within(layers, 1e-10, "q8_0")] == [NOT_OBSERVABLE, PROVEN, WRONG]
