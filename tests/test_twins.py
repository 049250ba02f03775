"""A twin, and anything else cached for a file, belongs to all of the file's bytes; twins in use are not removed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep, time_ns

import gguf
import numpy as np
import pytest
from cli import Cli, refused
from msgspec.structs import replace

from checkpoints.cache import cache_dir, cache_limit
from checkpoints.content import content_hash
from checkpoints.errors import InputError
from checkpoints.fingerprint import fingerprint
from checkpoints.gguf_file import contents, header_bytes
from checkpoints.record import ModelInfo
from checkpoints.whole_file import create_locked
from reference.client import Reference
from reference.twin_cache import cached, evict, workspace

UNSAMPLED = "blk.5.attn_q.weight"  # of the embedded model: most of it lies between the pages that the fingerprint reads
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache of its own."""
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path_factory.mktemp("cache")))


def change_between_samples(model: Path) -> None:
    """Double one block's scale of a Q8_0 tensor in place, so that the fingerprint stays what it was."""
    file = contents(model)
    tensor = next(tensor for tensor in file.tensors if tensor.name == UNSAMPLED)
    data = bytearray(model.read_bytes())
    before = fingerprint(model)
    for block in range(tensor.elements // 32):
        at = file.data + tensor.offset + 34 * block
        scale = np.frombuffer(data, np.float16, 1, at)[0] * np.float16(2)
        old, data[at : at + 2] = data[at : at + 2], scale.tobytes()
        model.write_bytes(data)
        if scale and fingerprint(model) == before:
            return
        data[at : at + 2] = old
    raise AssertionError("every block is sampled")


@pytest.fixture
def model(stories: Path, tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    path = tmp_path / "model.gguf"
    path.write_bytes(stories.read_bytes())
    return path


@pytest.mark.slow
def test_a_model_that_was_changed_anywhere_has_another_twin(model: Path) -> None:
    """After a change in place between the fingerprint's samples the twin has the new weights, not those of the old twin."""
    with Reference() as reference:
        old = reference.twin(model)
        change_between_samples(model)
        new = reference.twin(model)
    assert new != old
    weights = {tensor.name: tensor for tensor in gguf.GGUFReader(new).tensors}
    original = next(tensor for tensor in gguf.GGUFReader(model).tensors if tensor.name == UNSAMPLED)
    expected = gguf.quants.dequantize(original.data, original.tensor_type)
    np.testing.assert_array_equal(weights[UNSAMPLED].data.reshape(expected.shape), expected)


@pytest.mark.slow
def test_dumps_of_a_changed_model_are_of_two_models(parity: Cli, model: Path) -> None:
    """`diff` refuses dumps of two files that only their whole content tells apart, and `drift check` calls it no drift."""
    (model.parent / "prompts.txt").write_text("Once\n")
    dump = ("dump", "ours", "--model", model, "--tokens", "5,6", "--points", "embd", "-o")
    assert parity(*dump, "a.jsonl").code == 0
    assert parity("drift", "record", "--model", model, "--prompts", "prompts.txt", "-o", "golden").code == 0
    change_between_samples(model)
    assert parity(*dump, "b.jsonl").code == 0
    refused(parity("diff", "a.jsonl", "b.jsonl"), "different models")
    refused(parity("drift", "check", "golden"), "the model changed, which is no drift")
    refused(parity("isolate", "a.jsonl", "--model", model), "was made from stories-14m")


def test_what_dumps_say_of_their_model_is_compared_as_far_as_both_say_it() -> None:
    """Old dumps know the fingerprint only; content decides where both have it; the twin of a model is the model."""
    old, new = ModelInfo(fingerprint="f"), ModelInfo(fingerprint="f", content="c")
    other, twin = ModelInfo(fingerprint="f", content="d"), ModelInfo(fingerprint="t", content="e")
    assert old.may_be(new)
    assert new.may_be(old)
    assert not new.may_be(other)
    assert ModelInfo(fingerprint="f", content="c", twin="t").may_be(twin)
    assert not new.may_be(twin)
    assert ModelInfo().may_be(new)


def flipped(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def zeroed(data: bytearray) -> None:
    data[-9_000_000:] = bytes(9_000_000)


def cut(data: bytearray) -> None:
    del data[-70_000:]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flipped, zeroed, cut])
def test_a_damaged_twin_is_made_again_with_a_line(
    model: Path, damage: Callable[[bytearray], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """A twin with one wrong bit, without its end, or shortened is neither used nor blamed on the model; its times don't vouch for it."""
    with Reference() as reference:
        path = reference.twin(model)
    right, status = path.read_bytes(), path.stat()
    data = bytearray(right)
    damage(data)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with Reference() as reference:
        assert reference.twin(model) == path
    assert path.read_bytes() == right
    assert capfd.readouterr().err == "parity: the F32 copy of model.gguf in the cache was damaged and has been made again.\n"


def test_a_large_file_is_hashed_again_when_it_was_touched(tmp_path: Path) -> None:
    """What is remembered of a large file is forgotten after a change that keeps size and mtime."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 26)
    os.utime(path, ns=(10**18, 10**18))
    first = content_hash(path)
    assert content_hash(path) == first
    with path.open("r+b") as file:
        file.seek(1 << 25)
        file.write(b"x")
    os.utime(path, ns=(10**18, 10**18))
    assert content_hash(path) != first
    assert len(list((cache_dir() / "hashes").iterdir())) == 1


def test_the_hash_of_a_file_that_was_just_written_is_not_believed(tmp_path: Path) -> None:
    """Within a tick of the file system's clock a second change would keep all times: the file is hashed again."""
    path = tmp_path / "large"
    path.write_bytes(bytes(1 << 23))
    soon = time_ns() + 10**12  # a busy machine may not hash it within a tick
    os.utime(path, ns=(soon, soon))
    first = content_hash(path)
    (record,) = (cache_dir() / "hashes").iterdir()
    record.write_text(record.read_text().replace(first, "0" * 32))
    assert content_hash(path) == first


@pytest.mark.slow
def test_a_remembered_hash_is_used(tmp_path: Path) -> None:
    """The hash of a large file that lay still before it was hashed is read from the cache, also where the cache then is damaged."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 26)
    sleep(3.2)  # a file that was touched within the last three seconds is hashed again
    first = content_hash(path)
    (record,) = (cache_dir() / "hashes").iterdir()
    record.write_text(record.read_text().replace(first, "0" * 32))
    assert content_hash(path) == "0" * 32
    record.write_text("{")
    assert content_hash(path) == first


@pytest.mark.slow
def test_use_of_a_twin_is_noted_beside_it(model: Path) -> None:
    """Taking a twin from the cache makes it the last used one and leaves its own times alone, by which its hash stays known."""
    with Reference() as reference:
        path = reference.twin(model)
    (unused,), before = cached(), path.stat()
    with Reference() as reference:
        assert reference.twin(model) == path
    (twin,), after = cached(), path.stat()
    assert twin.used > unused.used
    assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
    path.unlink()
    workspace()
    assert not list((cache_dir() / "used").iterdir())


@pytest.mark.slow
def test_a_twin_in_use_is_not_evicted(model: Path, synthetic: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cache is too small for two, the twin of a run under way stays, and goes when that run has ended."""
    monkeypatch.setenv("PARITY_CACHE_GB", "0")
    with Reference() as other:
        first = other.twin(model)
        with Reference() as reference:
            second = reference.twin(synthetic(kind="f16"))
            assert first.exists()
            assert second.exists()
    evict()
    assert cached() == []


def test_files_in_the_making_are_left_to_their_owner(tmp_path: Path) -> None:
    """A temporary file of a process that runs is neither counted nor swept; one whose process is gone is."""
    folder = workspace()
    held, descriptor = create_locked(folder, "tmp-", "-f32.gguf")
    (folder / "tmp-77-left-f32.gguf").write_bytes(b"x")
    (folder / f".left.{'0' * 16}.part").write_bytes(b"x")
    workspace()
    assert [path.name for path in folder.iterdir()] == [held.name]
    assert cached() == []
    os.close(descriptor)
    workspace()
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_several_models_at_once_share_a_cache_that_is_too_small(
    synthetic: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three runs of different models at the same time, with room for none of their twins, all find parity."""
    monkeypatch.setenv("PARITY_CACHE_GB", "0.0001")
    words = (sys.executable, "-P", "-m", "parity", "run", "--tokens", "5,6", "--model")
    runs = [
        subprocess.Popen(
            [*words, synthetic(kind="f16", layers=layers), "--out", tmp_path / str(layers)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for layers in (1, 2, 3)
    ]
    ended = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], ended


@pytest.mark.parametrize("text", ["abc", "nan", "inf", "-1", "1e400"])
def test_a_bound_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """PARITY_CACHE_GB must be a finite number of gigabytes."""
    monkeypatch.setenv("PARITY_CACHE_GB", text)
    with pytest.raises(InputError, match="PARITY_CACHE_GB"):
        cache_limit()


@pytest.mark.slow
def test_a_wrong_bound_stops_a_run_before_it_computes(parity: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """`PARITY_CACHE_GB=abc` is one line, also where a twin is in the cache already."""
    assert parity("dump", "ref", "--prompt", "hi", "--points", "embd", "-o", "a.jsonl").code == 0
    monkeypatch.setenv("PARITY_CACHE_GB", "abc")
    refused(parity("dump", "ref", "--prompt", "hi", "--points", "embd", "-o", "b.jsonl"), "PARITY_CACHE_GB is 'abc'")


def test_dimensions_of_1_at_the_end_of_a_shape(reference: Reference, model: Path) -> None:
    """llama.cpp leaves them out of the copy, where a converter writes them (norms of one head, one expert): that is no loss."""
    file = contents(model)
    infos = [replace(tensor, ne=(*tensor.ne, 1)) if len(tensor.ne) == 1 else tensor for tensor in file.tensors]
    model.write_bytes(header_bytes(file.metadata, infos) + model.read_bytes()[file.data :])
    twin = reference.twin(model)
    assert {tensor.name for tensor in contents(twin).tensors} == {tensor.name for tensor in file.tensors}
