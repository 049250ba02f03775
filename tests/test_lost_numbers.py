"""NaN and infinities of one record alone: what agrees after them shows that the engine did not compute them, or leaves that open."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from checkpoints.reading.reader import read
from checkpoints.record import Dump
from parity.diff.compare import Options, compare
from parity.diff.verdict.first import BLAMED
from reference.client import Reference
from reference.jobs import DumpJob

F32 = Options(compute="f32")
Sides = Callable[[str], tuple[Faulty, Dump, Dump]]


@pytest.fixture(scope="module")
def sides(reference: Reference, small_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """A function that gives a small model's engine, the engine's whole dump and llama.cpp's; each is made once."""
    made: dict[str, tuple[Faulty, Dump, Dump]] = {}

    def of(name: str) -> tuple[Faulty, Dump, Dump]:
        if name not in made:
            path, out = small_model(name), tmp_path_factory.mktemp(name) / "ref.jsonl"
            tokens = tokens_of(path, 4, 1)
            reference.dump(DumpJob(path, out, tokens, points="blk.0.*", slice_size=4096))
            engine = Faulty(path, reference.graph(path))
            made[name] = engine, engine.dump(Planted(()), tokens, points="blk.0.*", size=4096, bare=False), read(out)
        return made[name]

    return of


def with_value(dump: Dump, name: str, value: float, element: int) -> Dump:
    """A dump with another value of one element of position 2 at a point of layer 0."""
    rows = dump.points[f"blk.0.{name}"]
    values = rows.values.copy()
    values[2, element] = value
    return replace(dump, points={**dump.points, f"blk.0.{name}": replace(rows, values=values)})


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        ("rwkv7", "sub", np.inf),  # repeated for six lanes
        ("rwkv7", "scale", np.nan),  # an exponential
        ("rwkv7", "mul.2", np.nan),  # the recurrence
        ("rwkv7", "time_mix_g1", np.inf),  # a sigmoid, which would give 1
        ("gpt-oss", "ffn_moe_gate", np.inf),  # bounds, which would give theirs
        ("gpt-oss", "ffn_moe_down", np.inf),  # the experts' bias
        ("gpt-oss", "ffn_moe_probs", np.inf),  # the expert would have been chosen
    ],
)
def test_what_no_agreeing_value_is_made_from_is_the_records(sides: Sides, model: str, name: str, value: float) -> None:
    """A repetition, an exponential, a recurrence, a bounded function, an added bias or a choice that agrees did not have it."""
    _, right, ref = sides(model)
    scores = ref.points["blk.0.ffn_moe_probs"].values[2] if name == "ffn_moe_probs" else np.zeros(1)
    verdict = compare(with_value(right, name, value, int(scores.argmin())), ref, F32)
    assert verdict
    assert [(fault.checkpoint, fault.kind) for fault in verdict.record_faults] == [(f"blk.0.{name}", "nonfinite")]


@pytest.mark.parametrize("value", [np.nan, -1.0])
def test_scores_of_experts_that_were_not_chosen_blame_no_operation(sides: Sides, value: float) -> None:
    """Nothing reads the score of such an expert: it differs, the choice and the weights do not, and no operation is called wrong."""
    _, right, ref = sides("gpt-oss")
    lowest = int(ref.points["blk.0.ffn_moe_probs"].values[2].argmin())
    lower = value * 2 * float(np.abs(ref.points["blk.0.ffn_moe_probs"].values).max())
    verdict = compare(with_value(right, "ffn_moe_probs", lower, lowest), ref, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.0.ffn_moe_probs"
    assert BLAMED not in verdict.operation
    assert "not chosen" in verdict.operation


def test_an_infinity_that_a_function_bounds_may_be_computed(sides: Sides) -> None:
    """Where the activation is 0, as ReLU makes it of −∞, the agreeing value shows nothing: no record is called wrong."""
    _, right, ref = sides("rwkv7")
    element = int(ref.points["blk.0.unary.7"].values[2].argmin())
    assert ref.points["blk.0.unary.7"].values[2, element] == 0
    verdict = compare(with_value(right, "channel_mix_key", -np.inf, element), ref, F32)
    assert not verdict
    assert not verdict.record_faults
    assert BLAMED not in verdict.operation


def test_an_infinity_that_was_computed_is_the_operations(sides: Sides) -> None:
    """An engine whose sigmoid's argument overflows computes with that: the operation is wrong, not the record."""
    engine, right, ref = sides("rwkv7")
    assert right.header is not None

    def overflows(*inputs: np.ndarray, op: Callable[..., np.ndarray], **params: object) -> np.ndarray:
        out = op(*inputs, **params).copy()
        out[2] = np.inf
        return out

    steps = [
        replace(step, op=lambda *x, op=step.op, **p: overflows(*x, op=op, **p)) if step.makes == "blk.0.time_mix_g1" else step
        for step in engine.right
    ]
    wrong = engine.dump(Planted(()), right.header.tokens, points="blk.0.*", size=4096, bare=False, steps=steps)
    verdict = compare(wrong, ref, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.0.time_mix_g1"
    assert BLAMED in verdict.operation
    assert not verdict.record_faults
