"""Files from outside, with values that no writer of ours leaves: each is one line, or what was kept is made again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli, refused
from msgspec.structs import replace
from safetensors.numpy import save_file

from checkpoints.answers.conform import Cell, CellResult
from checkpoints.errors import InputError
from checkpoints.given_json import decoded
from parity.conform import results
from parity.score.base import Base, load
from parity.score.text import Chunk
from parity.weights.safetensors_folder import Folder

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [DEEP, '["\\ud800"]', '{"\\uDFFF": 1}', "{", '["\\ud83d \\ude00"]'])
def test_what_cannot_be_read_or_written_again_is_refused(text: str) -> None:
    """Too deep for the parser, and half a character, are errors of the text like any other."""
    with pytest.raises(ValueError, match=r"\S"):
        decoded(text)


def test_whole_characters_and_infinity_are_read() -> None:
    """A pair of surrogates is one character; Hugging Face's configurations contain Infinity."""
    assert decoded('["\\ud83d\\ude00", "\\\\ud800", Infinity]') == ["😀", "\\ud800", float("inf")]


KEPT = CellResult(Cell("llama", "F32", "one", "prefill"), "parity", nmse=1e-12, of_limit=0.01, key="ab" * 32)


@pytest.mark.parametrize(
    "change",
    [
        {"nmse": "x"}, {"nmse": float("nan")}, {"of_limit": [[]]},
        {"verdict": 0}, {"verdict": []}, {"reason": "\ud800"}, {"architecture": {}},
        {"architecture": "qwen2"}, {"key": "cd" * 32}, {"token_idx": 1.5}, {"rope": None},
    ],
)  # fmt: skip
def test_a_kept_result_that_is_not_this_cells_is_made_again(change: dict[str, Any], tmp_path: Path) -> None:
    """A stored result with a value of another type, or of another cell or key, counts as none."""
    results.save(tmp_path, KEPT)
    assert results.load(tmp_path, KEPT.cell, KEPT.key) is not None
    (file,) = tmp_path.rglob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert results.load(tmp_path, KEPT.cell, KEPT.key) is None


def test_a_kept_result_that_is_nested_too_deeply_is_made_again(tmp_path: Path) -> None:
    """The parser's own limit is no internal error."""
    results.save(tmp_path, KEPT)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(file.read_text().replace('"parity"', DEEP))
    assert results.load(tmp_path, KEPT.cell, KEPT.key) is None


def _points(facts: dict[str, Any]) -> None:
    facts["points"] = 9


def _source(facts: dict[str, Any]) -> None:
    facts["source"] = "theirs"


def _slice(facts: dict[str, Any]) -> None:
    facts["slice_size"] = 2**40


def _format(facts: dict[str, Any]) -> None:
    facts["format"] = None


def _tokens(facts: dict[str, Any]) -> None:
    facts["prompts"] = [{"text": "a", "tokens": ["x"], "pieces": [], "generated": [], "generated_pieces": [], "file": "0"}]


@pytest.mark.parametrize(
    ("damage", "words"),
    [(_points, "points"), (_tokens, "tokens"), (_source, "source"), (_format, "format"), (_slice, "slice_size")],
)
def test_a_golden_folder_with_a_value_of_another_type_is_one_line(
    damage: Callable[[dict[str, Any]], None], words: str, parity: Cli, tmp_path: Path
) -> None:
    """The place in drift.json is named before anything is run; a side or a format that there is not, too."""
    facts = dict.fromkeys(["model", "fingerprint", "model_name", "points", "created"], "") | {"source": "ref", "mode": "exact"}
    whole: dict[str, Any] = {"format": 1, **facts, "slice_size": 16, "build": {}, "prompts": []}
    damage(whole)
    (tmp_path / "drift.json").write_text(json.dumps(whole))
    refused(parity("drift", "check", tmp_path), "drift.json is damaged", words)


def test_deep_texts_of_every_command_are_one_line(parity: Cli, tmp_path: Path) -> None:
    """config.json, a report's parts, golden dumps and options."""
    (tmp_path / "config.json").write_text(DEEP)
    (tmp_path / "drift.json").write_text(DEEP)
    refused(parity("weights", "--hf", tmp_path), "config.json: it is nested too deeply")
    refused(parity("drift", "check", tmp_path), "drift.json")
    Path("a.jsonl").write_text('{"checkpoint": "embd", "token_idx": 0, "values": [1.5, 2]}\n')
    refused(parity("diff", "a.jsonl", "a.jsonl", "--html", "r.html", "--include", tmp_path / "config.json"), "config.json")


def test_a_limit_is_refused_before_cells_run(parity: Cli) -> None:
    """A tolerance without end is the request's fault, not a crash of every cell."""
    refused(parity("conform", "--side", "ours", "--tolerance", "inf"), "--tolerance must be 0 or more and finite")


def test_a_ledgers_line_with_a_value_of_another_type_is_skipped(parity: Cli, tmp_path: Path) -> None:
    """It is counted among the lines that are not entries; the others are shown."""
    figures = {"nmse": 1e-12, "limit": 1e-10, "margin": 100.0}
    entry = {
        "schema": 1,
        "time": "2026-11-27T12:00:00+00:00",
        "commit": "",
        "verdict": "parity",
        "source": "ours",
        "golden": "0",
    }
    entry |= {"versions": {}, "points": {"embd": figures}}
    lines = [entry, entry | {"source": {"a": 1}}, entry | {"versions": {"a": []}}, entry | {"commit": 1}]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = parity("drift", "history", tmp_path)
    assert (ran.code, "3 lines" in ran.out + ran.err) == (0, True), ran


def test_an_engine_that_answers_for_another_model_is_unusable(parity: Cli, tmp_path: Path) -> None:
    """A dump that cannot be compared is the engine's fault, and no crash of parity."""
    header = {"type": "header", "format": 1, "source": "x", "compute": "f32", "model": {"name": "other", "fingerprint": "00"}}
    lines = [header, {"checkpoint": "embd", "token_idx": 0, "values": [1.5, 2]}]
    (tmp_path / "dump.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    axes = ("--architectures", "llama", "--types", "F32", "--prompts", "one", "--modes", "prefill", "--workers", "1")
    code, answer = parity.json("conform", "--exec", f"cat {tmp_path / 'dump.jsonl'}", *axes)
    (cell,) = answer["cells"]
    assert (code, cell["verdict"]) == (1, "unusable"), cell
    assert "different models" in cell["reason"]


def _base(**changes: object) -> Base:
    """Two predictions of three tokens each, as `BaseWriter` keeps them."""
    logits = np.array([[2, 1, 0], [3, 2, 1]], np.float32)
    arrays = {
        "tokens": np.arange(8),
        "ids": np.array([[5, 6, 7], [7, 6, 5]], np.int32),
        "logits": logits,
        "log_sums": np.log(np.exp(logits.astype(np.float64)).sum(axis=1) + 1),
        "next_logits": np.array([1, 2], np.float32),
    }
    return Base("a side", 4, **(arrays | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": np.zeros((2, 0), np.int32), "logits": np.zeros((2, 0), np.float32)},
        {"ids": np.zeros((2, 3), np.float32)},
        {"logits": np.full((2, 3), np.nan, np.float32)},
        {"logits": np.full((2, 3), 9, np.float32)},
        {"log_sums": np.array(1.0)},
        {"log_sums": np.ones((2, 1))},
        {"log_sums": np.array([-np.inf, 5])},
        {"next_logits": np.array([np.nan, 1], np.float32)},
        {"tokens": np.zeros((4, 2), np.int64)},
    ],
)
def test_a_base_file_that_no_side_writes_is_damaged(changes: dict[str, object], tmp_path: Path) -> None:
    """Other types, shapes, no predictions, NaN, and logits beyond the sum over all; the right one is read back."""
    for base, words in ((_base(), ""), (_base(**changes), "damaged")):
        arrays = {name: getattr(base, name) for name in ("tokens", "ids", "logits", "log_sums", "next_logits")}
        save_file(arrays, tmp_path / "base", {"format": "1", "name": base.name, "context": "4"})
        if words:
            with pytest.raises(InputError, match=words):
                load(tmp_path / "base")
        else:
            assert load(tmp_path / "base").context == 4


def test_a_base_of_another_vocabulary_or_a_shorter_text_is_refused() -> None:
    """Ids that the vocabulary lacks, and fewer predictions than the text has, are no index errors."""
    base, text = _base(), [Chunk(0, (0, 1, 2, 3), 2)]
    base.check(text, 8, Path("b"))
    for ids in (np.full((2, 3), 8, np.int32), np.full((2, 3), -1, np.int32), base.ids[:0]):
        with pytest.raises(InputError, match="another text"):
            replace(base, ids=ids).check(text, 8, Path("b"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 1, "content": []}, {"id": "x", "content": {}}, 3]}),
        (
            "tokenizer_config.json",
            {"bos_token": {"content": {}}, "added_tokens_decoder": {"9" * 5000: {"content": []}, "²": {}}},
        ),
        ("generation_config.json", {"bos_token_id": {}, "bos_token": ["a"]}),
    ],
)
def test_special_tokens_of_other_types_are_none(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    """Damaged files of a tokenizer leave the ids that config.json gives."""
    (tmp_path / "config.json").write_text('{"bos_token_id": 7}')
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / name).write_text(json.dumps(content))
    assert Folder(tmp_path).special("bos") == {7}


def test_an_archive_that_is_not_there_is_said_to_be_missing(parity: Cli, tmp_path: Path) -> None:
    """What is missing cannot be saved again."""
    refused(parity("weights", "--theirs", tmp_path / "none.npz"), "none.npz: No such file or directory. Check the path.")


def test_two_outputs_are_two_files(parity: Cli, stories_run: Path, tmp_path: Path) -> None:
    """One path for two outputs is refused before anything is computed: the second would replace the first."""
    ours, ref = stories_run / "ours.jsonl", stories_run / "ref.jsonl"
    for name in ("out.csv", "none/../out.csv"):
        words = ("diff", ours, ref, "--html", tmp_path / "out.csv", "--table", tmp_path / name)
        refused(parity(*words), "is given for two outputs")
    assert not (tmp_path / "out.csv").exists()


def test_a_model_that_git_lfs_has_not_fetched_is_named(parity: Cli, tmp_path: Path) -> None:
    """The pointer that stands in place of a large file is no damaged model."""
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(parity("model", tmp_path / "m.gguf"), "is a Git LFS pointer, not the model. Fetch it: git lfs pull.")
