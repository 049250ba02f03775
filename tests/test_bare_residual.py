"""Three bare points in which a residual is missing: the engine's fault, or the capture's."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from checkpoints.reading.reader import read
from checkpoints.record import Dump
from parity.diff.compare import Options, compare
from parity.lint.lint import lint

F32 = Options(compute="f32")


def test_a_missing_residual_from_bare_lines(tmp_path: Path) -> None:
    """attn_out = ffn_inp in three bare points: lint suspects, and the reference decides between the engine and the capture."""
    rng = np.random.default_rng(7)
    branch, stream, out = (rng.standard_normal((3, 16)).astype(np.float32) for _ in range(3))
    names = ("blk.3.ffn_inp", "blk.3.attn_out", "blk.3.l_out")

    def lines(name: str, *arrays: NDArray[np.float32]) -> Dump:
        path = tmp_path / name
        path.write_text(
            "\n".join(
                json.dumps({"checkpoint": point, "token_idx": t, "values": row.tolist()})
                for point, array in zip(names, arrays, strict=True)
                for t, row in enumerate(array)
            )
        )
        return read(path)

    ours = lines("ours.jsonl", branch, branch, out)
    report = lint(ours)
    assert report.usable
    assert [(finding.rule, finding.severity) for finding in report.findings] == [("same-vector", "suspicion")]
    wrong = compare(ours, lines("ref.jsonl", branch + stream, branch, out + 1), F32)
    assert wrong.first_divergence is not None
    assert wrong.first_divergence.checkpoint == "blk.3.ffn_inp"
    assert wrong.pattern is not None
    assert (wrong.pattern.code, wrong.pattern.sentence) == (
        "no-op",
        "blk.3.ffn_inp is blk.3.attn_out, unchanged: the addition of blk.2.l_out does nothing",
    )
    captured_wrong = compare(lines("late.jsonl", stream, stream, out), lines("right.jsonl", stream, branch, out), F32)
    assert captured_wrong
    assert [fault.sentence.partition(";")[0] for fault in captured_wrong.record_faults] == ["it is blk.3.ffn_inp"]
