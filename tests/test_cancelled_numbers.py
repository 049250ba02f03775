"""Sums of one number that all but cancel at one position: rounding if what is made from them agrees, a fault if they are off by more."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from recorded import F32

from checkpoints.answers.diff import Verdict
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from parity.diff.compare import compare
from reference.client import Reference
from reference.jobs import DumpJob

GATE, TOKENS = "blk.1.ffn_shexp_gate_inp", (11, 40, 299, 5, 80, 3)


@pytest.fixture(scope="module")
def ref(small_model: Callable[..., Path], reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    """llama.cpp's dump of a model with a gate of one number."""
    out = tmp_path_factory.mktemp("gate") / "ref.jsonl"
    reference.dump(DumpJob(small_model("qwen2moe", kind="f32"), out, TOKENS, points="*", slice_size=None))
    return read(out)


def _off_by(ref: Dump, part: float) -> Verdict:
    """The verdict if one gate is a hundredth of the largest one, and off by a part of the largest one."""
    dumps = []
    for error in (0.0, part):
        rows = ref.points[GATE]
        values = rows.values.copy()
        largest = float(np.abs(values).max())
        at = int(np.abs(values[:, 0]).argmin())
        values[at] = largest * 1e-2
        values[at] += largest * error
        stats = {**rows.stats, "l2": np.abs(values[:, 0]).astype(np.float64)} if error == 0 else {}
        gate = replace(rows, values=values, stats=stats, sketch=None)
        dumps.append(replace(ref, points={**ref.points, GATE: gate}))
    right, ours = dumps
    assert ours.header is not None
    return compare(replace(ours, header=replace(ours.header, source="an engine", dataflow=None)), right, F32)


def test_a_number_that_all_but_cancels_is_no_fault_of_its_record(ref: Dump) -> None:
    """A gate that is a hundredth of the others and off by a 300,000th of them: rounding of the sum, which the answer says."""
    verdict = _off_by(ref, 3e-6)
    assert verdict
    assert verdict.record_faults == ()
    assert verdict.excused == 1
    assert any("sums that all but cancel" in note for note in verdict.notes)


@pytest.mark.parametrize("part", [3e-5, 1e-3, 1.0])
def test_a_number_that_is_off_by_more_is_one(ref: Dump, part: float) -> None:
    """The same gate off by more than the largest one may be is not excused, whatever agrees behind it."""
    verdict = _off_by(ref, part)
    assert verdict.excused == 0
    assert [fault.checkpoint for fault in verdict.record_faults] == [GATE]
