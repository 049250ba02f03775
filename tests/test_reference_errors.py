"""Proves that anything wrong with a file or a request is one clear error that says what to do."""

import os
import signal
import struct
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_writing import finish
from msgspec.structs import replace
from processes import comes_true

from checkpoints.errors import InputError, ModelError, ParityError, ReferenceFailed
from checkpoints.gguf_file import contents, header_bytes
from checkpoints.gguf_values import string_value
from reference.client import Reference
from reference.jobs import NATIVE, DumpJob
from reference.worker import _answer

TOKENS = (2047, 430, 457)


@pytest.fixture
def job(stories: Path, tmp_path: Path) -> DumpJob:
    """A job that works."""
    return DumpJob(stories, tmp_path / "out.jsonl", TOKENS)


def _refused(reference: Reference, job: DumpJob) -> ParityError:
    with pytest.raises(ParityError) as caught:
        reference.dump(job)
    assert "\n" not in str(caught.value)
    assert caught.value.advice
    assert not job.out.is_file()
    return caught.value


@pytest.mark.parametrize("size", [0, 3, 20, 5000, 60_000, 1_000_000])
def test_cut_short(reference: Reference, job: DumpJob, tmp_path: Path, size: int) -> None:
    """A file that ends too early is refused, wherever it ends."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(job.model.read_bytes()[:size])
    error = _refused(reference, replace(job, model=path))
    assert isinstance(error, ModelError)
    # Where the table of contents is cut, its own counts already say that the file is too short for them.
    assert ("cut short" in error.message or "than fit into" in error.message) == (size > 3)


def test_no_file_folder_and_other_formats(reference: Reference, job: DumpJob, tmp_path: Path) -> None:
    """No file, a folder and a file of another format are told apart."""
    assert "No such file" in _refused(reference, replace(job, model=tmp_path / "none.gguf")).message
    assert "is a folder" in _refused(reference, replace(job, model=tmp_path)).message
    (tmp_path / "text.gguf").write_text("hello")
    assert "not a GGUF" in _refused(reference, replace(job, model=tmp_path / "text.gguf")).message
    with pytest.raises(ModelError, match="No such file"):
        reference.tokenize(tmp_path / "none.gguf", "a")
    with pytest.raises(ModelError, match="No such file"):
        reference.twin(tmp_path / "none.gguf")


def _without_tensors(source: Path, out: Path, changes: dict[str, str] | None = None, drop: str = "") -> Path:
    metadata = {k: v for k, v in contents(source).metadata.items() if not (drop and k.startswith(drop))}
    metadata |= {key: string_value(text) for key, text in (changes or {}).items()}
    out.write_bytes(header_bytes(metadata, []))
    return out


def test_vocabulary_only(reference: Reference, job: DumpJob, tmp_path: Path) -> None:
    """A file without weights tokenizes, and is refused where it would have to compute."""
    path = _without_tensors(job.model, tmp_path / "vocab.gguf")
    assert reference.tokenize(path, "Once upon").ids == reference.tokenize(job.model, "Once upon").ids
    error = _refused(reference, replace(job, model=path))
    assert "has a tokenizer but no tensors: it can tokenize, not compute." in error.message
    assert error.advice == "Use a model file with weights."


def test_no_tokenizer(reference: Reference, job: DumpJob, tmp_path: Path) -> None:
    """A file without a tokenizer says so, and one with an unknown tokenizer gives llama.cpp's reason."""
    path = _without_tensors(job.model, tmp_path / "none.gguf", {"tokenizer.ggml.model": "no_vocab"}, "tokenizer.")
    with pytest.raises(ModelError, match="has no tokenizer"):
        reference.tokenize(path, "a")
    path = _without_tensors(job.model, tmp_path / "lacking.gguf", drop="tokenizer.")
    with pytest.raises(ModelError, match=r"cannot load .*tokenizer"):
        reference.tokenize(path, "a")
    path = _without_tensors(job.model, tmp_path / "other.gguf", {"tokenizer.ggml.pre": "martian"})
    with pytest.raises(ModelError, match=r"cannot load .*martian"):
        reference.tokenize(path, "a")


def test_unknown_architecture(reference: Reference, job: DumpJob, tmp_path: Path) -> None:
    """An architecture that llama.cpp doesn't know is named."""
    path = tmp_path / "martian.gguf"
    writer = gguf.GGUFWriter(path, "martian")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
    finish(writer)
    assert "unknown model architecture: 'martian'" in _refused(reference, replace(job, model=path)).message


def test_a_model_that_only_its_twin_shows_wrong_is_named(reference: Reference, job: DumpJob, tmp_path: Path) -> None:
    """Where llama.cpp refuses the F32 twin, the error names the file that was given, not the one in the cache."""
    path = tmp_path / "fewer.gguf"
    data = job.model.read_bytes()
    at = data.index(b"qwen2.block_count") + len("qwen2.block_count") + 4
    path.write_bytes(data[:at] + struct.pack("<I", 23) + data[at + 4 :])
    assert f"cannot load {path}: " in _refused(reference, replace(job, model=path)).message


def test_a_file_that_vanishes_is_no_bug() -> None:
    """What the system refuses while the child computes is an error of the request with the file's name."""
    answer = _answer(lambda item: Path("/no/such/file").stat(), (), {}, print)
    assert answer[:3] == ("error", "InputError", "/no/such/file: No such file or directory.")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tokens": ()}, "the prompt is empty"),
    ({"tokens": (5, 2048)}, r"token id 2048 is outside the vocabulary of .* \(0…2047\)"),
    ({"tokens": (-1,)}, "token id -1 is outside"),
    ({"lead": (9999,)}, "token id 9999 is outside"),
    ({"tokens": (5,) * 513}, "513 positions are more than the 512"),
    ({"tokens": (5,) * 510, "generate": 3}, "513 positions are more than the 512"),
    ({"mode": "rough"}, "--mode 'rough'"),
    ({"kv_type": "f16"}, "is not available in exact mode"),
    ({"kv_type": "q8_0", "mode": NATIVE}, "is not available in native mode"),
    ({"positions": (0, 3)}, "there is no position 3"),
    ({"positions": ()}, "selects no position"),
    ({"positions": "some"}, "'some'"),
    ({"layers": (24,)}, "no layer 24"),
    ({"generate": -1}, "cannot generate -1"),
    ({"slice_size": 0}, "--slice must be at least 1, not 0"),
    ({"window": 0}, "window of 0"),
    ({"window": "some"}, "'some'"),
    ({"points": ""}, "selects nothing"),
    ({"points": "blk.24.q"}, "there is no point"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_request(reference: Reference, job: DumpJob, changes: dict[str, Any], message: str) -> None:
    """Each wrong part of a request is named before anything is written."""
    with pytest.raises(InputError, match=message) as caught:
        reference.dump(replace(job, **changes))
    assert caught.value.exit_code == 2
    assert not job.out.exists()


def test_empty_text(reference: Reference, stories: Path) -> None:
    """An empty text is no prompt; any other is, also with bytes that are no UTF-8."""
    with pytest.raises(InputError, match="the prompt is empty"):
        reference.tokenize(stories, "")
    assert reference.tokenize(stories, " ").ids
    assert reference.tokenize(stories, "a\udcff\0b").ids
    with pytest.raises(InputError, match="token id 5000"):
        reference.pieces(stories, [5000])


def test_unwritable(reference: Reference, job: DumpJob, tmp_path: Path) -> None:
    """An output that cannot be written is an error of the request."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "out.jsonl"):
        with pytest.raises(InputError, match="cannot write"):
            reference.dump(replace(job, out=out))
        with pytest.raises(InputError, match="cannot write"):
            reference.quantize(job.model, "Q4_0", out)


def test_wrong_type(reference: Reference, stories: Path, tmp_path: Path) -> None:
    """A file type that llama.cpp doesn't have is refused with the list of those it has."""
    with pytest.raises(InputError, match=r"there is no file type 'Q9_9'.*Q4_K_M"):
        reference.quantize(stories, "Q9_9", tmp_path / "x.gguf")


def test_interrupted(stories: Path, job: DumpJob) -> None:
    """An interrupt in the parent ends the child at once, and the object can be used again."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    with Reference() as handle:
        handle.versions()
        pid = handle.pid
        before = signal.signal(signal.SIGALRM, interrupt)
        once_it_writes = threading.Thread(target=lambda: comes_true(job.out.exists) and os.kill(os.getpid(), signal.SIGALRM))
        try:
            once_it_writes.start()
            with pytest.raises(KeyboardInterrupt):
                handle.dump(replace(job, tokens=(5,) * 500, points="all", mode=NATIVE))
        finally:
            once_it_writes.join()
            signal.signal(signal.SIGALRM, before)
        assert handle.pid is None
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert handle.tokenize(stories, "a").ids


def test_killed_child(stories: Path) -> None:
    """A child that the system killed is reported as such."""
    with Reference() as handle:
        handle.versions()
        handle._children[0].process.kill()
        with pytest.raises(ReferenceFailed, match=r"was killed while tokenizing with .*memory"):
            handle.tokenize(stories, "a")
