"""Foreign names become ours by a mapping file, even if only a slice was recorded; names that stay unknown are listed."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli import Cli
from dumps import dump, noisy, random
from msgspec.structs import replace
from numpy.typing import NDArray
from safetensors.numpy import save_file

from checkpoints.errors import InputError, ParityError
from checkpoints.formats import load
from checkpoints.mapping import read_mapping
from checkpoints.nearest import nearest, unknown_names
from checkpoints.record import Dump
from parity.diff.compare import compare

POINTS = ("embd", "blk.3.q_rope", "blk.3.l_out")
HEADS = 4
NO_POINTS = (
    '[names]\nwte = ""',
    '[names]\nwte = "em\\nbd"',
    f'[names]\nwte = "{"x" * 201}"',
    '[names]\nwte = "blk.{i}.l_out"',
    '[names]\n"h.{i}" = "embd"',
    '[names]\n"h.{i}.{i}" = "blk.{i}.l_out"',
    f"a = {'[' * 3000}",
    f"{'a.' * 20000}b = 1",
)
ARRAYS = random(POINTS, positions=9)


def neighbours(q: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows whose pairs stand in halves of each head, with the pairs side by side."""
    split = q.reshape(len(q), HEADS, 2, -1)
    return np.ascontiguousarray(split.swapaxes(2, 3)).reshape(q.shape)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_mapping_file_says_what_names_mean(tmp_path: Path) -> None:
    """Names with a layer, layer offsets, transposed arrays and Q in the other pairing become ours; errors name the file."""
    theirs = {
        "h.4.q": neighbours(ARRAYS["blk.3.q_rope"]),
        "h.4": ARRAYS["blk.3.l_out"],
        "wte": np.ascontiguousarray(ARRAYS["embd"].T),
    }
    save_file(theirs, tmp_path / "theirs.safetensors")
    names = written(
        tmp_path / "names.toml",
        "layer_offset = -1\n[names]\n"
        '"h.{i}.q" = { point = "blk.{i}.q_rope", rope_pairs = "norm", heads = 4 }\n"h.{i}" = "blk.{i}.l_out"\n'
        'wte = { point = "embd", transpose = true }\n',
    )
    renamed = load(tmp_path / "theirs.safetensors", read_mapping(names))
    assert set(renamed.points) == set(POINTS)
    assert compare(renamed, dump(ARRAYS)).verdict == "parity"
    for text in (
        *NO_POINTS,
        "[names",
        "x = 1",
        f"layer_offset = {1 << 62}",
        'names = "x"',
        "[names]\na = 1",
        '[names]\na = {point = "q", rope_pairs = "x"}',
    ):
        with pytest.raises(ParityError, match=r"names\.toml"):
            read_mapping(written(names, text))


def sliced(pairs: str, tmp_path: Path, *, shape: bool) -> tuple[Dump, Dump]:
    """Bare lines of 16 of 64 values in one pairing, mapped to the other, and the reference's slice of 16."""
    ours = dict(noisy(ARRAYS))
    halves, side = ours["blk.3.q_rope"], neighbours(ours["blk.3.q_rope"])
    printed, wanted = (
        (side, ARRAYS) if pairs == "norm" else (halves, {**ARRAYS, "blk.3.q_rope": neighbours(ARRAYS["blk.3.q_rope"])})
    )
    lines = [
        json.dumps({"checkpoint": name, "token_idx": t, "values": row[:16].tolist()} | ({"shape": [64]} if shape else {}))
        for name, rows in (("embd", ours["embd"]), ("h.3.q", printed))
        for t, row in enumerate(rows)
    ]
    path = written(tmp_path / "ours.jsonl", "\n".join(lines))
    size = "heads = 4" if shape else "head_size = 16"
    names = written(
        tmp_path / "m.toml", f'[names]\n"h.{{i}}.q" = {{ point = "blk.{{i}}.q_rope", rope_pairs = "{pairs}", {size} }}\n'
    )
    return load(path, read_mapping(names)), dump(wanted)


@pytest.mark.parametrize("shape", [True, False])
@pytest.mark.parametrize("pairs", ["norm", "neox"])
def test_pairs_of_a_slice_are_put_where_they_belong(pairs: str, shape: bool, tmp_path: Path) -> None:
    """Sixteen printed values of Q in the other pairing are compared element by element; a wrong one is found, at its true index."""
    ours, ref = sliced(pairs, tmp_path, shape=shape)
    verdict = compare(ours, ref)
    assert verdict
    assert any("16 of its 16 values are among the first 16" in note for note in verdict.notes)
    rows = ours.points["blk.3.q_rope"]
    values = rows.values.copy()
    values[:, 1] += 1
    wrong = compare(replace(ours, points={**ours.points, "blk.3.q_rope": replace(rows, values=values)}), ref)
    assert wrong.first_divergence is not None
    assert wrong.first_divergence.index == (8 if pairs == "norm" else 2)


def test_what_a_slice_cannot_tell_is_said(tmp_path: Path) -> None:
    """Of heads of 32 the reference's 16 values hold half of ours; without the head's size, and for a transpose, one line says no."""
    lines = [
        json.dumps({"checkpoint": "q", "token_idx": t, "values": [1.0 + t, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]})
        for t in range(3)
    ]
    path = written(tmp_path / "ours.jsonl", "\n".join(lines))

    def mapped(entry: str) -> Dump:
        return load(path, read_mapping(written(tmp_path / "m.toml", f'[names]\nq = {{ point = "blk.0.q_rope", {entry} }}\n')))

    dump = mapped('rope_pairs = "norm", head_size = 32')
    indices = dump.points["blk.0.q_rope"].indices
    assert indices is not None
    assert indices[0].tolist() == [0, 16, 1, 17, 2, 18, 3, 19]
    assert any("4 of its 8 values" in note and "--slice 20" in note for note in dump.notes)
    for entry, message in (
        ('rope_pairs = "norm", heads = 2', "needs head_size"),
        ("transpose = true", "whole rows"),
        ("reshape = [2, 4]", "whole rows"),
        ('rope_pairs = "neox", head_size = 5', "heads of 5 elements, which must be even"),
        ("reshape = [true]", "reshape a list of sizes"),
        ('transpose = "yes"', "transpose true or false"),
        ("heads = true", "heads and head_size are numbers"),
    ):
        with pytest.raises(InputError, match=message):
            mapped(entry)


def test_a_mapping_of_another_editor_is_read_or_said_to_be_of_another_encoding(tmp_path: Path) -> None:
    """A byte order mark and Windows' line ends are no names; UTF-16 is named as what it is not."""
    path, text = tmp_path / "names.toml", "[names]\r\nwte = 'embd'\r\n"
    path.write_text(text, encoding="utf-8-sig", newline="")
    assert read_mapping(path).entry("wte")[0] == "embd"
    path.write_text(text, encoding="utf-16")
    with pytest.raises(InputError, match="it is not UTF-8"):
        read_mapping(path)


def test_two_names_of_one_point_are_no_wrong_positions(parity: Cli, tmp_path: Path) -> None:
    """A mapping that gives two names with other values one point is named as the mistake; the same value under two names is none."""
    written(tmp_path / "m.toml", '[names]\nx = "embd"\n')
    for first, value, code in (("NaN", "NaN", 0), (1.5, 1.5, 0), (1.5, 2.5, 2)):
        records = [{"checkpoint": name, "token_idx": 0, "values": [v, 1.0]} for name, v in (("x", first), ("embd", value))]
        written(tmp_path / "ours.jsonl", "\n".join(map(json.dumps, records)))
        ran = parity("convert", "ours.jsonl", "--map", "m.toml", "-o", "out.jsonl")
        assert ran.code == code, ran.err
    assert "'x' and 'embd' of ours.jsonl are both embd" in ran.err


def test_a_table_of_many_names_may_stand_in_one_line(tmp_path: Path) -> None:
    """Dots in strings and comments are no parts of a key: 300 names in a line are read, a key with 2,000 parts is refused."""
    names = ", ".join(f"\"model.layers.{i}.mlp.down_proj\" = 'blk.{i}.ffn_out'" for i in range(300))
    path = written(tmp_path / "m.toml", f"# {'.' * 2000}\nnames = {{{names}}}\n")
    assert read_mapping(path).entry("model.layers.7.mlp.down_proj")[0] == "blk.7.ffn_out"
    for key in ("a." * 2000 + "b", '"a".' * 2000 + "b"):
        with pytest.raises(InputError, match="nested too deeply"):
            read_mapping(written(tmp_path / "m.toml", f"{key} = 'embd'\n"))


def test_unknown_names_are_listed_with_the_nearest(parity: Cli, tmp_path: Path) -> None:
    """A foreign name in JSON lines is said in one line by lint and diff, with the points that look like it."""
    assert "blk.5.attn_out" in nearest("layer_5_attn_output")
    assert unknown_names(("embd", "blk.0.l_out")) == ()
    lines = [json.dumps({"checkpoint": "block3_ffn_normed", "token_idx": t, "values": [t + 0.5] * 3}) for t in range(2)]
    written(tmp_path / "ours.jsonl", "\n".join(lines))
    notes = parity.json("lint", "ours.jsonl")[1]["notes"]
    assert len(notes) == 1
    assert "block3_ffn_normed (nearest: blk.3.ffn_norm" in notes[0]
    ran = parity("diff", "ours.jsonl", "ours.jsonl", "--despite-lint")
    assert "nearest: blk.3.ffn_norm" in " ".join(ran.out.split())
