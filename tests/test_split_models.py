"""Models in several files are read as one; parts that are missing or do not belong together are one line."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, refused
from split_files import part, split

from checkpoints.errors import ModelError
from checkpoints.formats import load
from checkpoints.gguf_file import contents
from engine.fast.weights import lacking
from engine.weights.gguf_model import GgufModel
from parity.drift.golden import seen_from
from parity.run.command import Command
from parity.run.request import Request
from parity.run.sides import ExternalEngine
from parity.weights.mishaps import mishaps
from reference.client import Reference

Make = Callable[..., Path]
PARTS = 3


def in_parts(small_model: Make, out: Path, name: str = "qwen3moe", kind: str = "q8_0", parts: int = PARTS) -> Path:
    return split(small_model(name, kind, layers=2), out, parts)


def test_every_tensor_is_the_one_of_the_whole_file(small_model: Make, tmp_path: Path) -> None:
    """Names, shapes, types and bytes of the parts together are the whole file's, and its metadata are the first part's."""
    whole = GgufModel(small_model("qwen3moe", "q8_0", layers=2))
    joined = GgufModel(in_parts(small_model, tmp_path / "m.gguf"))
    assert {info.part for info in joined.tensors.values()} == set(range(PARTS))
    assert set(joined.tensors) == set(whole.tensors)
    for name, info in whole.tensors.items():
        assert (joined.tensors[name].shape, joined.tensors[name].type) == (info.shape, info.type)
        np.testing.assert_array_equal(joined.raw(name), whole.raw(name))
    assert joined.hyperparameters == whole.hyperparameters


def test_a_byte_of_any_part_changes_the_model_s_identity(small_model: Make, tmp_path: Path) -> None:
    """The last byte of the last part is the model's as well as the first part's: another twin, another fingerprint."""
    first = in_parts(small_model, tmp_path / "m.gguf")
    before = contents(first)
    identity = (before.fingerprint, before.content)
    last = part(tmp_path / "m.gguf", PARTS, PARTS)
    data = bytearray(last.read_bytes())
    data[-40] ^= 1
    last.write_bytes(data)
    after = contents(first)
    assert after.fingerprint != identity[0]
    assert after.content != identity[1]


def test_a_mishap_reads_the_part_that_has_the_tensor(small_model: Make, tmp_path: Path) -> None:
    """The block before a tensor is that of its own part: the same values as in the whole file."""
    whole = GgufModel(small_model("qwen3moe", "q8_0", layers=2))
    joined = GgufModel(in_parts(small_model, tmp_path / "m.gguf"))
    name = [name for name, info in joined.tensors.items() if info.part == PARTS - 1][-1]
    ways = (dict(mishaps(model, model.tensors[name], 64, (4, 2))) for model in (whole, joined))
    values, same = (way["off by one block, backwards"]() for way in ways)
    assert values is not None
    np.testing.assert_array_equal(same, values)


def test_the_fast_mode_leaves_split_models_to_the_plain_engine(stories: Path, tmp_path: Path) -> None:
    """It reads one file only, so a model that it could run as a whole is refused in parts."""
    assert lacking(GgufModel(stories)) is None
    assert lacking(GgufModel(split(stories, tmp_path / "m.gguf", PARTS))) == "no models in several files"


def test_no_part_is_written_over(parity: Cli, small_model: Make, tmp_path: Path) -> None:
    """Each part is an input, not only the first one, which the command names."""
    first = in_parts(small_model, tmp_path / "m.gguf")
    last = part(tmp_path / "m.gguf", PARTS, PARTS)
    before = last.read_bytes()
    refused(parity("twin", first, "-o", last), last.name, "must not be overwritten")
    assert last.read_bytes() == before


def test_golden_dumps_name_a_link_by_its_own_name(small_model: Make, tmp_path: Path) -> None:
    """In a cache of links to files named by their hash, as Hugging Face's is, only the links have the names of parts."""
    blobs, snapshot, golden = (tmp_path / name for name in ("blobs", "snapshot", "golden"))
    for folder in (blobs, snapshot, golden):
        folder.mkdir()
    in_parts(small_model, blobs / "m.gguf")
    for number in range(1, PARTS + 1):
        named = part(snapshot / "m.gguf", number, PARTS)
        named.symlink_to((blobs / named.name).rename(blobs / f"blob-{number}"))
    recorded = golden / seen_from(golden, part(snapshot / "m.gguf", 1, PARTS))
    assert len(contents(recorded).parts) == PARTS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3moe", "gemma2"])
def test_run_isolate_and_weights_of_a_split_model(parity: Cli, small_model: Make, tmp_path: Path, name: str) -> None:
    """What whole files can do, split ones can: parity in both modes, every operation proven, weights, a twin."""
    first = in_parts(small_model, tmp_path / "m.gguf", name)
    model = ("--model", first)
    tokens = ("--tokens", "5,6,7,8,9")
    assert "parity: " in parity("run", *model, *tokens, "--points", "all", "--generate", "2").out
    assert parity("run", *model, *tokens, "--mode", "native").code == 0
    dump = tmp_path / "ref.jsonl"
    assert parity("dump", "ref", *model, *tokens, "--points", "all", "--full", "-o", dump).code == 0
    code, answer = parity.json("isolate", dump, *model)
    assert code == 0
    assert {operation["status"] for operation in answer["operations"]} == {"proven"}
    assert parity("weights", *model).code == 0
    assert parity("model", first).code == 0
    twin = tmp_path / "twin.gguf"
    assert parity("twin", first, "-o", twin).code == 0
    assert set(contents(twin).metadata).isdisjoint({"split.no", "split.count", "split.tensors.count"})
    assert len(contents(twin).tensors) == len(contents(first).tensors)


@pytest.mark.slow
def test_windows_of_a_split_model(parity: Cli, stories: Path, tmp_path: Path) -> None:
    """A window's file takes each tensor from the part that has it, also where the steps are those written by hand."""
    first = split(stories, tmp_path / "m.gguf", PARTS)
    out = tmp_path / "run"
    assert parity("run", "--model", first, "--prompt", "Once upon a time", "--window", "12", "-o", out).code == 0
    header = load(out / "ref.jsonl").header
    assert header is not None
    assert header.build["window"] == 12


def test_a_part_that_is_missing_is_named(parity: Cli, small_model: Make, tmp_path: Path) -> None:
    """The file that llama.cpp would look for is named, whichever command asks."""
    first = in_parts(small_model, tmp_path / "m.gguf")
    lost = part(tmp_path / "m.gguf", 2, PARTS)
    lost.unlink()
    for command in (
        ("run", "--tokens", "5", "--model"),
        ("weights", "--model"),
        ("model",),
        ("twin", "-o", tmp_path / "t.gguf"),
    ):
        refused(parity(*command, first), "part 2 of 3", str(lost))


def test_another_part_than_the_first_is_refused(parity: Cli, small_model: Make, tmp_path: Path) -> None:
    """llama.cpp takes the first part alone, and so does parity, which says what to name."""
    first = in_parts(small_model, tmp_path / "m.gguf")
    refused(parity("run", "--tokens", "5", "--model", part(tmp_path / "m.gguf", 2, PARTS)), "part 2 of 3", first.name)


def test_parts_out_of_order(small_model: Make, tmp_path: Path) -> None:
    """Two parts with each other's names are refused by what they say of themselves."""
    first = in_parts(small_model, tmp_path / "m.gguf")
    second, third = (part(tmp_path / "m.gguf", number, PARTS) for number in (2, 3))
    aside = tmp_path / "aside"
    shutil.move(second, aside)
    shutil.move(third, second)
    shutil.move(aside, third)
    with pytest.raises(ModelError, match=r"is not part 2 of 3 of this model: its split\.no is 2, not 1"):
        contents(first)


@pytest.mark.slow
def test_parts_of_another_model(small_model: Make, tmp_path: Path) -> None:
    """A part of a model with other tensors, of a model in more parts, and a file that is no part are each one line."""
    first = in_parts(small_model, tmp_path / "m.gguf")
    second = part(tmp_path / "m.gguf", 2, PARTS)
    more = in_parts(small_model, tmp_path / "more.gguf", parts=4)
    other = split(small_model("phi3", "q8_0", layers=2), tmp_path / "other.gguf", PARTS)
    for taken, problem in (
        (part(more.with_name("more.gguf"), 2, 4), "its split.count is 4, not 3"),
        (small_model("phi3", "q8_0", layers=2), "its split.no is None, not 1"),
        (part(other.with_name("other.gguf"), 2, PARTS), "tensors together|has blk"),
    ):
        shutil.copy(taken, second)
        with pytest.raises(ModelError, match=problem):
            contents(first)


def test_a_first_part_under_another_name(small_model: Make, tmp_path: Path) -> None:
    """The others are found by the first one's name: a name that says nothing of parts is refused with the one it needs."""
    first = in_parts(small_model, tmp_path / "m.gguf")
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"cannot be found by its name") as error:
        contents(renamed)
    assert "model-00001-of-00003.gguf" in error.value.advice


def test_a_part_that_is_cut_short_is_named(small_model: Make, tmp_path: Path) -> None:
    """Of a part whose end is missing its own name is said, not the first one's."""
    first = in_parts(small_model, tmp_path / "m.gguf")
    last = part(tmp_path / "m.gguf", PARTS, PARTS)
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf is cut short"):
        GgufModel(first)


def test_an_engine_is_given_an_f32_model_in_one_file(small_model: Make, reference: Reference, tmp_path: Path) -> None:
    """An F32 model needs no twin, but in parts it is joined for an engine that reads the file that it is given and no other."""
    first = in_parts(small_model, tmp_path / "m.gguf", "qwen3", "f32")
    assert reference.twin(first) == first
    given = ExternalEngine(Request(first, mode="exact"), Command("engine {model} {tokens} {out}"), reference).model
    joined, whole = contents(given), contents(small_model("qwen3", "f32", layers=2))
    assert len(joined.parts) == 1
    assert {tensor.name for tensor in joined.tensors} == {tensor.name for tensor in whole.tensors}
