"""Experts that are chosen by a hair: a right engine in lower arithmetic chooses others, and is no more accused for that."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from changed_files import File
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from checkpoints.reading.reader import read
from engine.replay.precision import rounded
from parity.diff.compare import Options
from parity.explain.on_model import compared_on
from reference.client import Reference
from reference.jobs import DumpJob


def _near_ties(model: Path, out: Path) -> Path:
    """The model with every second row of its routers nearly that of the one before: scores are 1e-4 apart."""
    file, draw = File(model), np.random.default_rng(1)
    for name in file.named("ffn_gate_inp.weight"):
        router = file.tensors[name]
        router[1::2] = router[::2] * (1 + 3e-4 * draw.standard_normal(router[::2].shape)).astype(np.float32)
    return file.write(out)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "storage"), [("f16", False), ("bf16", True)])
def test_a_right_engine_is_not_accused(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path, kind: str, storage: bool
) -> None:
    """Nothing says what it computes in: products in F16, or everything in BF16. The arithmetic is named, the choices are near ties."""
    path, out = _near_ties(small_model("mixtral", kind="f32"), tmp_path / "model.gguf"), tmp_path / "ref.jsonl"
    engine = Faulty(path, reference.graph(path))
    tokens = tokens_of(path, 9, seed=2)
    reference.dump(DumpJob(path, out, tokens, points="all", slice_size=None))
    steps = rounded(engine.right, kind, storage=storage)
    dump = engine.dump(Planted(()), tokens, points="all", size=1 << 20, bare=False, steps=steps)
    assert dump.header is not None
    dump = replace(dump, header=replace(dump.header, compute="", dataflow=None))
    verdict = compared_on(dump, read(out), Options(), path).verdict
    assert verdict.first_divergence is None
    assert verdict.precision is not None
    assert verdict.precision.arithmetic == kind
