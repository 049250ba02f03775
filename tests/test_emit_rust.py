"""The Rust file compiles and writes what our writer writes."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from checkpoints.reading.reader import read
from checkpoints.summary import summarise
from parity.emit import source
from parity.lint.lint import lint

MAIN = """
mod parity_dump;
fn main() -> std::io::Result<()> {
    assert!(parity_dump::Recorder::create("refused.jsonl", "m", &[], "fp4", 24).is_err());
    for word in ["", "BF16", "fp16", "float32"] {
        assert!(parity_dump::Recorder::create("accepted.jsonl", "m", &[], word, 24).is_ok());
    }
    let mut tap = parity_dump::Recorder::create("rust.jsonl", "m\\"n\\u{301}\\u{1}", &[1, 2, 3], "f32", 24)?;
    tap.only("blk.5.l_out,logits");
    tap.checkpoint("blk.5.l_ou", 0, &[1.0])?;
    for t in 0..3 {
        let mut row: Vec<f32> = (0..64).map(|i| ((i * i + 13 * t) % 29) as f32 / 7.0 - 1.5).collect();
        if t == 2 { row[5] = f32::NAN; row[40] = f32::NEG_INFINITY; }
        tap.pass(t as usize, t > 0);
        tap.checkpoint("blk.5.l_out", t as usize, &row)?;
    }
    tap.sequence(1);
    tap.checkpoint("logits", 7, &[1.0, 2.0])?;
    tap.finish()
}
"""


@pytest.mark.skipif(shutil.which("rustc") is None, reason="there is no rustc")
def test_the_rust_file_writes_what_our_writer_writes(tmp_path: Path) -> None:
    """Values and statistics are the same to the bit or to the order of a float64 sum, sketches to rounding."""
    (tmp_path / "parity_dump.rs").write_text(source("rust"))
    (tmp_path / "main.rs").write_text(MAIN)
    done = subprocess.run(
        ["rustc", "-D", "warnings", "--edition", "2021", "main.rs"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    subprocess.run([tmp_path / "main"], cwd=tmp_path, check=True)
    dump = read(tmp_path / "rust.jsonl")
    assert dump.notes == ()
    assert dump.header is not None
    assert (dump.header.model.name, dump.header.tokens) == ('m"n\u0301\x01', (1, 2, 3))
    assert (dump.header.compute, dump.header.slice, list(dump.points)) == ("f32", 24, ["blk.5.l_out", "logits"])
    last = dump.points["logits"]
    assert (last.seq.tolist(), last.token_idx.tolist(), last.step.tolist()) == ([1], [7], [2])
    assert dump.points["blk.5.l_out"].decode.tolist() == [False, True, True]
    i, t = np.arange(64)[None, :], np.arange(3)[:, None]
    rows = ((i * i + 13 * t) % 29).astype(np.float32) / np.float32(7) - np.float32(1.5)
    rows[2, 5], rows[2, 40] = np.nan, -np.inf
    ours, theirs = summarise("blk.5.l_out", rows.astype(np.float32), np.arange(3), slice_size=24), dump.points["blk.5.l_out"]
    assert np.array_equal(ours.values, theirs.values, equal_nan=True)
    for name in ("n", "sum", "l2", "nonfinite"):
        assert theirs.stats[name] == pytest.approx(ours.stats[name], rel=1e-12, abs=1e-12)
    assert theirs.sketch == pytest.approx(ours.sketch, rel=1e-6, abs=1e-6)
    assert [finding.rule for finding in lint(dump).findings] == ["non-finite"]
