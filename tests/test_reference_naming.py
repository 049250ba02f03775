"""Proves that other architectures' graphs are named: norms of their own, biases, nodes that have no point."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from cli import Cli
from other_models import HEADS, KV, SIZE, WIDTH, write_model

from checkpoints import points
from checkpoints.errors import InputError, ReferenceFailed
from checkpoints.reading.reader import read
from reference.client import Reference
from reference.jobs import EXACT, DumpJob

TOKENS = (2047, 430, 457, 258)


@pytest.fixture(scope="module")
def make(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a tiny model of an architecture."""
    folder = tmp_path_factory.mktemp("synthetic")

    def write(arch: str, kv_heads: int = KV) -> Path:
        return write_model(folder / f"{arch}-{kv_heads}.gguf", arch, stories, kv_heads)

    return write


def test_query_and_key_norms(reference: Reference, make: Callable[..., Path]) -> None:
    """qwen3: q and k, their norms and their rotations are three points each, with the relations they must have."""
    nodes = {node.point: value for node, value in reference.capture(make("qwen3"), TOKENS)}
    for letter, heads in (("q", HEADS), ("k", KV)):
        raw = nodes[f"blk.1.{letter}"].reshape(4, heads, SIZE)
        normed = nodes[f"blk.1.{letter}_norm"].reshape(4, heads, SIZE)
        rotated = nodes[f"blk.1.{letter}_rope"].reshape(4, heads, SIZE)
        ratio = normed / (raw / np.sqrt(np.mean(raw**2, axis=-1, keepdims=True) + 1e-6))
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1, :1], ratio.shape), rtol=1e-4)
        np.testing.assert_array_equal(rotated[0], normed[0])
        np.testing.assert_allclose(np.linalg.norm(rotated, axis=-1), np.linalg.norm(normed, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(nodes["blk.1.k_read"], nodes["blk.1.k_rope"].reshape(4, -1))


def test_output_bias(reference: Reference, make: Callable[..., Path]) -> None:
    """llama with a bias on the output projection: attn_out is the value after the bias."""
    path = make("llama")
    nodes = {node.point: value for node, value in reference.capture(path, TOKENS)}
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    expected = nodes["blk.1.kqv_out"] @ weights["blk.1.attn_output.weight"].T + weights["blk.1.attn_output.bias"]
    np.testing.assert_allclose(nodes["blk.1.attn_out"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(nodes["blk.1.ffn_inp"], nodes["blk.0.l_out"] + expected, rtol=1e-4, atol=1e-5)


def test_unknown_nodes_keep_their_names(reference: Reference, make: Callable[..., Path], tmp_path: Path) -> None:
    """gemma3, which has nodes without a point: they are dumped in their places, and embd is what the layers read."""
    path = make("gemma3")
    result = reference.dump(DumpJob(path, tmp_path / "gemma3.jsonl", TOKENS, points="all", generate=2))
    dump = read(result.out)
    names = [points.parse(name).kind for name in result.points if points.parse(name).layer == 1]
    known = {kind.name for kind in points.LAYER_KINDS} - {"ffn_swiglu"}  # Gemma's is a GELU
    assert known <= set(names)
    unknown = [name for name in names if name not in points.KINDS]
    assert "attn_post_norm" in unknown
    assert names.index("attn_out") < names.index("attn_post_norm") < names.index("ffn_norm")
    assert len(set(result.points)) == len(result.points)
    assert all(len(rows) == len(TOKENS) + len(result.generated) for rows in dump.points.values())
    raw, scaled = dump.points["node.inp_embd" if "node.inp_embd" in dump.points else "node.embd"], dump.points["embd"]
    np.testing.assert_allclose(scaled.values, raw.values * np.sqrt(WIDTH), rtol=1e-6)


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_windows_of_other_architectures(reference: Reference, make: Callable[..., Path], arch: str) -> None:
    """Layers 1 and 2 of three, fed with layer 0's output, give the whole model's logits to the bit."""
    path = make(arch)
    whole = {node.point: value for node, value in reference.capture(path, TOKENS)}
    part = {node.point: value for node, value in reference.layers(path, 1, 3, whole["blk.0.l_out"], None, EXACT)}
    assert set(part) == {name for name in whole if points.parse(name).layer != 0 and name not in ("embd", "node.embd")}
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)


def test_no_windows_where_layers_differ(reference: Reference, make: Callable[..., Path], tmp_path: Path) -> None:
    """An architecture whose layers look at their own number is refused window by window, and computed whole by default."""
    path = make("gemma3")
    with pytest.raises(InputError, match="gemma3 cannot be computed window by window"):
        reference.dump(DumpJob(path, tmp_path / "windows.jsonl", TOKENS, window=1))
    assert reference.dump(DumpJob(path, tmp_path / "whole.jsonl", TOKENS)).window is None


def test_assertion_of_ggml(make: Callable[..., Path]) -> None:
    """A model that ggml aborts on is an error that names the model and the assertion."""
    path = make("llama", 3)  # four heads cannot share three
    with (
        Reference() as handle,
        pytest.raises(ReferenceFailed, match=r"llama\.cpp aborted while .*llama-3\.gguf: GGML_ASSERT\("),
    ):
        list(handle.capture(path, TOKENS))


@pytest.mark.slow
def test_the_commands_take_an_architecture_that_nobody_wrote_down(make: Callable[[str], Path], parity: Cli) -> None:
    """`dump ref`, `diff` and `model` take gemma3, and `run` computes what the graph says."""
    model = make("gemma3")
    assert parity("run", "--model", model, "--tokens", "1,2,3").code == 0
    for name in ("a.jsonl", "b.jsonl"):
        assert parity("dump", "ref", "--model", model, "--tokens", "1,2,3", "--points", "all", "-o", name).code == 0
    assert parity("diff", "a.jsonl", "b.jsonl").code == 0
    code, facts = parity.json("model", model)
    assert code == 0
    assert "blk.0.q_norm" in facts["points"]
