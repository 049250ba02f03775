"""Proves that twins hold the very weights, and that windows of layers give the whole model's numbers to the bit."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from msgspec.structs import replace
from slow import slow_but

from checkpoints.errors import InputError
from checkpoints.gguf_file import contents
from checkpoints.reading.reader import read
from checkpoints.tensors import TensorReader
from reference.client import Reference
from reference.jobs import EXACT, NATIVE, DumpJob
from reference.library import Library
from reference.model import Model
from reference.sweep import dump_windows, window_size
from reference.twin_cache import cache_dir, cached, empty_cache

TOKENS = (2047, 430, 457, 258, 403)


@pytest.mark.parametrize("kind", slow_but(["Q8_0", "Q4_K_M", "Q5_0", "F16", "BF16"], "Q8_0", "F16"))
def test_twin_is_the_dequantisation(reference: Reference, quantized: Callable[[str], Path], kind: str) -> None:
    """A twin's weights are gguf-py's dequantisation of the original's, bit for bit."""
    model = quantized(kind)
    twin = gguf.GGUFReader(reference.twin(model))
    originals = {tensor.name: tensor for tensor in gguf.GGUFReader(model).tensors}
    assert {tensor.name for tensor in twin.tensors} == set(originals)
    for tensor in twin.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        original = originals[tensor.name]
        expected = gguf.quants.dequantize(original.data, original.tensor_type).reshape(tensor.data.shape)
        np.testing.assert_array_equal(tensor.data.view(np.uint32), expected.view(np.uint32))


def test_twin_is_found_again(reference: Reference, stories: Path, tmp_path: Path) -> None:
    """A twin is made once, an F32 file is its own twin, and `out` makes a copy in its own place."""
    first = reference.twin(stories)
    inode = first.stat().st_ino
    assert first.parent == cache_dir()
    assert reference.twin(stories) == first
    assert first.stat().st_ino == inode
    assert first in [item.path for item in cached()]
    copy = reference.twin(stories, tmp_path / "copy.gguf")
    assert copy.read_bytes() == first.read_bytes()
    assert reference.twin(copy) == copy
    assert not list(cache_dir().glob("tmp-*"))


@pytest.mark.slow
def test_cache_is_bounded(
    stories: Path, quantized: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache keeps the twins used last within its bound, and can be emptied."""
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path))
    monkeypatch.setenv("PARITY_CACHE_GB", "0.1")  # one twin of 58 MB, not two
    (tmp_path / "tmp-0123-left.gguf").write_bytes(b"x")
    with Reference() as handle:
        handle.twin(stories)
        second = handle.twin(quantized("Q5_0"))
    assert [item.path for item in cached()] == [second]
    assert not list(tmp_path.glob("tmp-*"))
    assert empty_cache() > 50_000_000
    assert cached() == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", slow_but([EXACT, NATIVE], EXACT))
def test_windows_are_the_whole(reference: Reference, stories: Path, tmp_path: Path, mode: str) -> None:
    """Prefill and decode are bit-identical in windows of 1, 5 and all layers, F32 and Q8_0."""
    some = "embd,blk.*.{attn_norm,q_rope,k_read,kq_soft_max,attn_out,l_out},output_norm,logits"
    job = DumpJob(stories, tmp_path / "whole.jsonl", TOKENS, points=some, full=True, lead=(11,), mode=mode, window="off")
    whole = reference.dump(job)
    assert whole.window is None
    assert whole.tensors is not None
    expected = TensorReader(whole.tensors)
    for size in (1, 5, 24):
        result = reference.dump(replace(job, out=tmp_path / f"{size}.jsonl", window=size))
        assert result.window == (size if size < 24 else None)
        assert result.points == whole.points
        assert result.tensors is not None
        tensors = TensorReader(result.tensors)
        assert set(tensors.names) == set(expected.names)
        for name in expected.names:
            point, _, step = name.partition("/")
            np.testing.assert_array_equal(tensors.get(point, int(step)), expected.get(point, int(step)), err_msg=name)
        dumps = read(whole.out), read(result.out)
        assert dumps[0].tokens == dumps[1].tokens
        assert dumps[0].records == dumps[1].records


@pytest.mark.slow
def test_generating_in_windows(reference: Reference, stories: Path, tmp_path: Path) -> None:
    """Tokens chosen window by window are those that the whole model chooses."""
    job = DumpJob(stories, tmp_path / "a.jsonl", TOKENS, generate=3, window="off")
    whole = reference.dump(job)
    parts = reference.dump(replace(job, out=tmp_path / "b.jsonl", window=12))
    assert parts.generated == parts.chosen == whole.generated
    assert read(parts.out).tokens == read(whole.out).tokens


@pytest.mark.slow
def test_layers_of_a_hidden_state(reference: Reference, stories: Path) -> None:
    """Layers fed with the whole model's own hidden state go on as the whole model does, to the bit."""
    whole = {node.point: value for node, value in reference.capture(stories, TOKENS)}
    values = {node.point: value for node, value in reference.layers(stories, 4, 5, whole["blk.3.l_out"])}
    assert set(values) == {name for name in whole if name.startswith("blk.4.")}
    rest = {node.point: value for node, value in reference.layers(stories, 20, 24, whole["blk.19.l_out"])}
    all_of_it = {node.point: value for node, value in reference.layers(stories, 0, 24, whole["embd"], "*.l_out,logits")}
    for part in (values, rest, all_of_it):
        for name, value in part.items():
            np.testing.assert_array_equal(value, whole[name], err_msg=name)
    assert "logits" in rest
    assert "logits" in all_of_it


def test_wrong_layers(reference: Reference, stories: Path) -> None:
    """Layers that are not there and a hidden state of another width are refused."""
    with pytest.raises(InputError, match="no layers 20…24"):
        list(reference.layers(stories, 20, 25, np.zeros((2, 256), np.float32)))
    with pytest.raises(InputError, match=r"\(2, 255\) is not \[T, 256\]"):
        list(reference.layers(stories, 0, 1, np.zeros((2, 255), np.float32)))


def test_window_size(stories: Path, tmp_path: Path) -> None:
    """By default the whole model is taken where it fits in half of the free memory, else as many layers as fit."""
    library, model_contents = Library(), contents(stories)
    job = DumpJob(stories, tmp_path / "out.jsonl", TOKENS)
    assert window_size(library, model_contents, job, 1 << 40) is None
    some = 100_000_000  # the twin takes 58 MB, a layer 2.3 MB
    assert window_size(library, model_contents, job, some) == 9
    assert window_size(library, model_contents, replace(job, mode=NATIVE), some) is None
    assert window_size(library, model_contents, replace(job, window="off"), some) is None
    assert window_size(library, model_contents, job, 1) == 1


def test_no_room_for_a_model_that_has_no_windows_is_said(small_model: Callable[..., Path], tmp_path: Path) -> None:
    """Who did not ask for windows reads that memory or cache lack room, and not that --window is to be left out."""
    library, model_contents = Library(), contents(small_model("gemma"))
    job = DumpJob(model_contents.path, tmp_path / "out.jsonl", TOKENS)
    with Model(library, model_contents.path, vocab_only=True) as vocabulary:
        with pytest.raises(InputError, match=r"no room for an F32 copy of gemma.* GB\).*window by window.*PARITY_CACHE"):
            dump_windows(library, vocabulary, model_contents, job, 1, 0.0)
        with pytest.raises(InputError, match=r"^gemma cannot be computed window by window"):
            dump_windows(library, vocabulary, model_contents, replace(job, window=1), 1, 0.0)
