"""What `parity conform` is made of: the matrix, its table, its lines of causes, results that are kept."""

import contextlib
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from checkpoints.answers.conform import Cell, CellResult, Conformance
from checkpoints.errors import InputError
from engine.synth.recipes import names
from parity.conform.conform import parts_of
from parity.conform.matrix import PROFILES, PROMPTS, TYPES, cells, modes_of, prompt_of
from parity.conform.results import load, save
from parity.conform.table import GrowingTable
from reports.conform import cause_line


def test_the_matrix_is_what_was_asked_for() -> None:
    """Globs and lists replace the profile's axes, cells that would be a plain prefill are left out, parts keep architectures together."""
    assert {cell.type for cell in cells("llama", types="Q*_K,f32")} == {"F32", *(name for name in TYPES if name.endswith("_K"))}
    assert [(cell.prompt, cell.mode) for cell in cells("quants", types="F32", prompts="one,short")] == [
        ("one", "prefill"), ("one", "batch"),
        ("short", "prefill"), ("short", "decode"), ("short", "chunked"), ("short", "batch"), ("short", "state"),
    ]  # fmt: skip
    for cell in cells("llama", types="F32", prompts="long"):
        prompt = prompt_of(cell)
        assert prompt is not None
        assert prompt.ids == PROMPTS["long"]
        assert sum(prompt.portions) in (0, len(prompt.ids))
    assert modes_of({"{state}", "{portions}"}) == ("prefill", "decode", "chunked", "state")
    parts = parts_of(cells("dense", types="F32,F16"))
    assert all(len({cell.architecture for cell in part}) == 1 for part in parts)
    assert sum(map(len, parts)) == len(cells("dense", types="F32,F16"))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_table_is_whole_while_cells_end(tmp_path: Path, ending: str) -> None:
    """After each cell a reader has all cells until then, and a run that breaks off leaves the last ones as well."""
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    path, results = tmp_path / f"cells.{ending}", [CellResult(cell, "parity") for cell in cells("llama", types="F32")]
    read = pd.read_csv if ending == "csv" else pd.read_parquet
    with GrowingTable(path, pause=0.0) as table:
        table(results[0], 1, 9)
        assert read(path)["architecture"].tolist() == ["llama"]
    with contextlib.suppress(InputError), GrowingTable(path, pause=60.0) as table:
        for number, result in enumerate(results):
            table(result, number + 1, len(results))
        raise InputError("the scheduler is gone")
    assert len(read(path)) == len(results) > 4
    with GrowingTable(None) as table:
        table(results[0], 1, 1)


def test_a_cause_of_one_kind_of_rope_says_so() -> None:
    """Cells of every architecture that rotates halves, and of no other that was compared, are "all NEOX architectures"."""
    kinds = {"llama": "NORM", "qwen2": "NEOX", "qwen3": "NEOX", "gemma3": "NEOX", "bloom": ""}

    def conformance(wrong: str) -> Conformance:
        return Conformance(
            "engine",
            tuple(
                CellResult(Cell(name, "F32", "short", "prefill"), verdict, cause="rope-pairs", compared=9, rope=kind)
                for name, kind in kinds.items()
                for verdict in ("divergence" if name in wrong.split() else "parity",)
            ),
        )

    for wrong, words in (
        ("qwen2 qwen3 gemma3", "rope-pairs: 3 cells · all NEOX architectures"),
        ("qwen2 qwen3", "rope-pairs: 2 cells · qwen2, qwen3"),
        ("llama", "rope-pairs: 1 cell · llama"),
        (" ".join(kinds), "rope-pairs: 5 cells · all architectures"),
    ):
        answer = conformance(wrong)
        assert cause_line(answer.causes[0], answer) == words


def test_a_result_is_read_back() -> None:
    """A result read back from disk equals the stored one."""
    result = CellResult(cells("llama")[0], "divergence", checkpoint="blk.0.q", token_idx=3, cause="x", nmse=1e-3)
    assert CellResult.from_dict(json.loads(json.dumps(result.as_dict()))) == result


def test_the_widest_profile_has_every_architecture() -> None:
    """No recipe is left out of `--profile all`, whichever family's file it stands in."""
    assert sorted(PROFILES["all"].architectures) == names()


def test_a_pipe_in_place_of_a_kept_result_is_refused(tmp_path: Path) -> None:
    """Whoever writes to a pipe that nobody reads waits for ever."""
    result = CellResult(next(iter(cells("llama", types="F32"))), "parity", key="abcdef")
    save(tmp_path, result)
    (kept,) = tmp_path.rglob("*.json")
    kept.unlink()
    os.mkfifo(kept)
    assert load(tmp_path, result.cell, result.key) is None
    with pytest.raises(InputError, match="is a pipe"):
        save(tmp_path, result)
