"""Native types against float32 where they cost more than a table for all models allows: T5, whose scores are not scaled."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli
from msgspec.structs import replace

from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine.graph import Step
from engine.opened import open_plain
from engine.replay.precision import rounded
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.diff.compare import Options, compare
from parity.explain.on_model import compared_on
from parity.run.ours import OursJob, dump
from reference.client import Reference
from reference.jobs import DumpJob

IDS = (3, 44, 5, 60, 7, 18, 9, 33, 80, 21)
pytestmark = pytest.mark.slow
Change = Callable[[Sequence[Step]], list[Step]]


@pytest.fixture(scope="module")
def t5(small_model: Callable[..., Path]) -> Path:
    """A right T5 whose native run by llama.cpp is further from float32 than the table's limit."""
    return small_model("t5", "q8_0", layers=2, head_size=128)


@pytest.fixture(scope="module")
def native(t5: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    """llama.cpp's native run."""
    out = tmp_path_factory.mktemp("native") / "ref.jsonl"
    reference.dump(DumpJob(t5, out, IDS, mode="native", points="all"))
    return read(out)


@pytest.fixture
def ours(t5: Path, reference: Reference, tmp_path: Path) -> Callable[[Change], Dump]:
    """A function that dumps our engine with changed steps of its encoder."""
    engine: Transformer = open_plain(GgufModel(t5), "numpy", recorded=partial(reference.graph, t5))

    def dumped(change: Change) -> Dump:
        right, engine.encoder = engine.encoder, change(engine.encoder or ())
        dump(engine, OursJob(tmp_path / "ours.jsonl", IDS, points="all", mode="native"))
        engine.encoder = right
        return read(tmp_path / "ours.jsonl")

    return dumped


def times(name: str, factor: float) -> Change:
    """One result too large."""

    def larger(*inputs: Any, op: Callable[..., Any], **params: Any) -> Any:
        return op(*inputs, **params) * np.float32(factor)

    return lambda steps: [replace(step, op=partial(larger, op=step.op)) if step.makes == name else step for step in steps]


def neighbour(steps: Sequence[Step]) -> list[Step]:
    """The second layer's values by the first layer's matrix."""
    return [
        replace(step, weights=("enc.blk.0.attn_v.weight", *step.weights[1:])) if step.makes == "enc.blk.1.v" else step
        for step in steps
    ]


def test_a_right_run_is_parity_and_says_what_native_types_cost(parity: Cli, t5: Path, native: Dump) -> None:
    """By the table it is a divergence; llama.cpp's own run on the F32 twin shows that native types alone make the difference."""
    code, answer = parity.json(
        "run", "--model", t5, "--tokens", ",".join(map(str, IDS)), "--mode", "native", "--points", "all", "--out", "it"
    )
    assert not compare(read("it/ours.jsonl"), native)
    assert (code, answer["verdict"]) == (0, "parity")
    assert any(note.startswith("native: ") and "F32 twin" in note for note in answer["notes"])


@pytest.mark.parametrize(
    "change",
    [
        times("enc.blk.1.ffn_out", 1.01),
        times("enc.blk.1.q", 1.3),
        times("enc.blk.1.v", 0.5),
    ],
    ids=["1.01", "1.3", "half"],
)
def test_a_fault_is_no_cost_of_native_types(t5: Path, native: Dump, ours: Callable[[Change], Dump], change: Change) -> None:
    """Neither one larger than the cost, nor one far below it: float32's limits beside the twin decide."""
    assert not compared_on(ours(change), native, Options(), t5).verdict


def test_a_fault_beyond_the_cost_is_a_divergence_at_its_place(t5: Path, native: Dump, ours: Callable[[Change], Dump]) -> None:
    """Another layer's weights: the answer is a divergence there, not an undecided one."""
    verdict = compared_on(ours(neighbour), native, Options(), t5).verdict
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "enc.blk.1.v"
    assert verdict.pattern is None or verdict.pattern.code != "undecided"


def test_an_engine_that_rounds_otherwise_is_undecided(t5: Path, native: Dump, ours: Callable[[Change], Dump]) -> None:
    """An engine that keeps its activations in BF16 is as far from the native run as that is from float32: nothing is blamed, and it is no
    parity."""
    verdict = compared_on(ours(lambda steps: rounded(steps, "bf16", storage=True)), native, Options(), t5).verdict
    assert not verdict
    assert verdict.pattern is not None
    assert (verdict.pattern.code, verdict.operation) == ("undecided", "")


def test_a_point_that_the_twin_lacks_proves_nothing_wrong(parity: Cli, small_model: Callable[..., Path]) -> None:
    """RWKV 7's native graph has a point more than its twin's: those beyond the table's limit agree with the twin, and that is parity."""
    model = small_model("rwkv7", "q8_0", width=256)
    code, answer = parity.json(
        "run", "--model", model, "--tokens", "5,9,17,33,2,40", "--mode", "native", "--points", "all", "--generate", "2"
    )
    assert (code, answer["verdict"]) == (0, "parity")
    assert any(note.startswith("native: ") for note in answer["notes"])
