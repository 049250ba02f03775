"""Points of architectures that are not written by hand: a name promises no more than the graph, and rows are those of their positions.

Each test checks a relation that follows from the point's meaning on llama.cpp's values, in plain NumPy.
"""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from cli import Cli, refused
from slow import slow_but

from checkpoints import points
from checkpoints.points import parse
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine.synth.recipe import Value
from reference.client import Reference
from reference.jobs import DumpJob

TOKENS = (5, 77, 300, 5, 901)
Make = Callable[..., Path]


def values(reference: Reference, model: Path, tokens: tuple[int, ...] = TOKENS) -> dict[str, np.ndarray]:
    """Every point's value over the tokens, exact mode."""
    return {node.point: value for node, value in reference.capture(model, tokens)}


def weights(model: Path) -> dict[str, np.ndarray]:
    """The file's tensors as float32."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(model).tensors}


def dump(reference: Reference, model: Path, folder: Path, **how: object) -> Dump:
    """A dump of all points, whole rows."""
    job = DumpJob(model, folder / "ref.jsonl", TOKENS, points="all", slice_size=None, **how)
    return read(reference.dump(job).out)


def normed(row: np.ndarray, weight: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """RMS norm with its weight."""
    return row / np.sqrt(np.mean(row.astype(np.float64) ** 2, axis=-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("name", ["phi3", "lfm2"])
def test_sums_without_a_name_lie_in_their_layer(reference: Reference, small_model: Make, name: str) -> None:
    """What is added to a layer's input belongs to that layer, not to the one whose output it is added to."""
    nodes = values(reference, small_model(name))
    for layer in (1, 3):
        expected = nodes[f"blk.{layer - 1}.l_out"] + nodes[f"blk.{layer}.attn_out"]
        np.testing.assert_allclose(nodes[f"blk.{layer}.ffn_inp"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            nodes[f"blk.{layer}.l_out"], nodes[f"blk.{layer}.ffn_inp"] + nodes[f"blk.{layer}.ffn_out"], rtol=1e-5, atol=1e-6
        )


def test_gate_and_up_in_one_product(reference: Reference, small_model: Make) -> None:
    """phi3's fused product is `ffn_gate_up`; its halves are the points of gate and up that an unfused model has."""
    nodes = values(reference, small_model("phi3", layers=1))
    gate, up = nodes["blk.0.ffn_gate"], nodes["blk.0.ffn_up"]
    np.testing.assert_array_equal(np.concatenate([gate, up], axis=1), nodes["blk.0.ffn_gate_up"])
    np.testing.assert_allclose(gate / (1 + np.exp(-gate)) * up, nodes["blk.0.ffn_swiglu"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds"), [("gemma3n", ("l_out", "predictions")), ("deepseek2", ("q_nope_absorbed", "q_rope"))]
)
def test_rows_are_those_of_their_positions(reference: Reference, small_model: Make, name: str, kinds: tuple[str, ...]) -> None:
    """Four tokens through four streams or four heads: each row is what five tokens give at that position."""
    model = small_model(name)
    four, five = values(reference, model, TOKENS[:4]), values(reference, model)
    for kind in kinds:
        assert len(four[f"blk.1.{kind}"]) == 4
        for position in range(4):
            np.testing.assert_allclose(
                four[f"blk.1.{kind}"][position],
                five[f"blk.1.{kind}"][position],
                rtol=1e-4,
                atol=1e-5,
                err_msg=f"{kind} {position}",
            )


def test_a_layer_ends_where_it_says(reference: Reference, small_model: Make) -> None:
    """kimi-k3's layers begin with a mixture of earlier values: the output of the one before is its sum, not what they read first."""
    graph = reference.graph(small_model("kimi-k3")).several
    ends = {tensor.point: tensor.name for tensor in graph.tensors if tensor.point.endswith(".l_out")}
    assert ends == {f"blk.{layer}.l_out": f"l_out-{layer}" for layer in range(4)}


@pytest.mark.slow
def test_a_norm_is_a_norm(reference: Reference, small_model: Make) -> None:
    """llama4 calls an attention output `ffn_norm`, lfm2 a norm `ffn_out`: the points are what their weights say."""
    for name, layer in (("llama4", 1), ("lfm2", 0)):
        model = small_model(name)
        nodes, tensors = values(reference, model), weights(model)
        before = nodes.get(f"blk.{layer}.ffn_inp", nodes.get(f"blk.{layer}.add"))
        expected = normed(before, tensors[f"blk.{layer}.ffn_norm.weight"], 1e-6)
        np.testing.assert_allclose(nodes[f"blk.{layer}.ffn_norm"], expected, rtol=1e-4, atol=1e-5)


def test_a_scaled_embedding_is_the_first_layers_residual(reference: Reference, small_model: Make) -> None:
    """granite multiplies the embedding, which enters layer 0: the sum with it is `ffn_inp`, as in the other layers."""
    graph = reference.graph(small_model("granite", layers=2)).several
    sums = [tensor.point for tensor in graph.tensors if "ffn_inp" in tensor.point]
    assert sums == ["blk.0.ffn_inp", "blk.1.ffn_inp"]


def test_norms_after_the_branches(reference: Reference, small_model: Make) -> None:
    """olmo2 normalises what attention and feed-forward give: what goes into the feed-forward is the sum, and no norm."""
    nodes = values(reference, small_model("olmo2", layers=2))
    assert "blk.1.ffn_norm" not in nodes
    expected = nodes["blk.0.l_out"] + nodes["blk.1.attn_post_norm"]
    np.testing.assert_allclose(nodes["blk.1.ffn_inp"], expected, rtol=1e-5, atol=1e-6)


def test_a_product_comes_with_its_bias(reference: Reference, small_model: Make) -> None:
    """gpt2: `ffn_up`, `ffn_out` and `attn_out` are the values after the bias, the products before it have names of their own."""
    model = small_model("gpt2", layers=1)
    nodes, tensors = values(reference, model), weights(model)
    up = nodes["blk.0.ffn_norm"] @ tensors["blk.0.ffn_up.weight"].T
    np.testing.assert_allclose(nodes["blk.0.ffn_up.mul_mat"], up, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(nodes["blk.0.ffn_up"], up + tensors["blk.0.ffn_up.bias"], rtol=1e-4, atol=1e-5)
    out = nodes["blk.0.kqv_out"] @ tensors["blk.0.attn_output.weight"].T + tensors["blk.0.attn_output.bias"]
    np.testing.assert_allclose(nodes["blk.0.attn_out"], out, rtol=1e-4, atol=1e-5)


def test_the_shared_experts_points_say_so(reference: Reference, small_model: Make) -> None:
    """Where experts are routed, `ffn_gate` and its like are not the shared expert's; ids of experts are whole numbers."""
    model = small_model("qwen2moe", layers=1)
    nodes, tensors = values(reference, model), weights(model)
    assert not {"blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_swiglu"} & nodes.keys()
    gate = nodes["blk.0.ffn_norm"] @ tensors["blk.0.ffn_gate_shexp.weight"].T
    np.testing.assert_allclose(nodes["blk.0.ffn_gate_shexp"], gate, rtol=1e-4, atol=1e-5)
    ids = nodes["blk.0.ffn_moe_topk"]
    assert ids.shape == (len(TOKENS), 2)
    best = np.argsort(-nodes["blk.0.ffn_moe_probs"], axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(ids, best)


def test_latent_attention(reference: Reference, small_model: Make) -> None:
    """deepseek2: `q` is before RoPE, `q_rope` and `k_rope` are what attention multiplies, latent and rotated parts side by side."""
    model = small_model("deepseek2", layers=1)
    nodes, tensors = values(reference, model), weights(model)
    q = nodes["blk.0.attn_q_a_norm"] @ tensors["blk.0.attn_q_b.weight"].T
    np.testing.assert_allclose(nodes["blk.0.q"], q, rtol=1e-4, atol=1e-5)
    assert "blk.0.k" not in nodes
    queries, keys = nodes["blk.0.q_rope"].reshape(5, 4, 80), nodes["blk.0.k_rope"].reshape(5, 80)
    scores = np.einsum("thd,sd->hts", queries.astype(np.float64), keys)
    np.testing.assert_allclose(np.tril(nodes["blk.0.kq"]), np.tril(scores), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(nodes["blk.0.k_read"].reshape(5, 80), keys)


@pytest.mark.slow
def test_order(reference: Reference, small_model: Make) -> None:
    """Norms stand in their layers, position embeddings before them, rotated parts before the keys that they are part of."""
    for name, before, after in (
        ("olmo2", "blk.1.norm.2", "blk.2.q"),
        ("gemma", "blk.1.norm", "blk.1.attn_norm"),
        ("gpt2", "pos_embd", "blk.0.attn_norm"),
        ("deepseek2", "blk.1.k_pe", "blk.1.k_rope"),
    ):
        names = [point for point, _ in reference.describe(small_model(name)).points]
        for listed in (names, points.order(names)):
            assert listed.index(before) < listed.index(after), name
        outside = [point for point in names[1:-4] if parse(point).layer is None]
        assert all(names.index(point) < names.index("blk.0.l_out") for point in outside), name


def test_encoders_are_not_cut(reference: Reference, small_model: Make, tmp_path: Path, parity: Cli) -> None:
    """bert: each position's scores and weights are of all positions, the pooled row is the mean; it generates nothing."""
    model = small_model("bert", layers=2)
    dumped = dump(reference, model, tmp_path)
    weight = dumped.points["blk.0.kq_soft_max"]
    assert set(weight.shapes) == {(4, len(TOKENS))}
    np.testing.assert_allclose(weight.stats["sum"], 4, rtol=1e-5)
    pooled = dumped.points["result_embd_pooled"]
    assert pooled.token_idx.tolist() == [len(TOKENS) - 1]
    np.testing.assert_allclose(pooled.values[0], dumped.points["blk.1.l_out"].values.mean(axis=0), rtol=1e-4, atol=1e-5)
    asked = parity("dump", "ref", "--model", model, "--tokens", "1,2,3", "--generate", "2", "-o", "d.jsonl")
    refused(asked, "bert computes embeddings", "--generate")


def test_encoder_and_decoder(reference: Reference, small_model: Make, tmp_path: Path) -> None:
    """t5: the encoder's points are of the prompt, the decoder's of what it writes, and its cross-attention sees the whole prompt."""
    dumped = dump(reference, small_model("t5", layers=2), tmp_path, generate=2)
    assert dumped.points["enc.blk.0.kqv_out"].token_idx.tolist() == list(range(len(TOKENS)))
    assert dumped.points["blk.1.l_out"].token_idx.tolist() == [0, 1, 2]
    assert dumped.points["logits"].token_idx.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["lfm2", "qwen3next", "qwen35"])
def test_the_embedding_has_its_point(reference: Reference, small_model: Make, name: str) -> None:
    """Whatever ggml calls it, what enters layer 0 is `embd`: here the token's row."""
    model = small_model(name)
    np.testing.assert_array_equal(values(reference, model)["embd"], weights(model)["token_embd.weight"][list(TOKENS)])


def test_states_are_points(reference: Reference, small_model: Make, tmp_path: Path) -> None:
    """mamba: each pass leaves the state of its last position; decoding on ends in the state of one longer prompt."""
    model = small_model("mamba", layers=1)
    stepped = dump(reference, model, tmp_path, lead=(31, 7))
    rows = stepped.points["blk.0.cache_s"]
    assert rows.token_idx.tolist() == [4, 5, 6]
    at_once = values(reference, model, (*TOKENS, 31, 7))
    np.testing.assert_allclose(rows.values[2], at_once["blk.0.cache_s"].reshape(-1), rtol=1e-4, atol=1e-6)
    assert "blk.0.cache_r" in stepped.points


@pytest.mark.parametrize("setting", slow_but(["rope.scaling.factor", "rope.scale_linear"], "rope.scaling.factor"))
def test_a_factor_without_a_type_scales(reference: Reference, parity: Cli, small_model: Make, setting: str) -> None:
    """llama.cpp scales positions by a factor that stands without a type, and so does our engine."""
    model = small_model("llama3-factors", layers=1, settings={setting: 4.0})
    assert parity("run", "--model", model, "--tokens", "1,2,3,4,5,6", "--points", "all").code == 0
    assert parity.json("model", model)[1]["rope_linear_scale"] == 0.25


def test_values_that_are_padded_for_the_cache(reference: Reference, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """With head counts by layer, `v` is the layer's own values, also where the fused product is as wide as the padded values."""
    settings: dict[str, Value] = {
        "attention.head_count": [8, 2, 8],
        "attention.head_count_kv": [2, 1, 4],
        "feed_forward_length": [96, 96, 96],
    }
    model, out = small_model("openelm", layers=3, settings=settings), tmp_path / "ref.jsonl"
    reference.dump(DumpJob(model, out, (5, 6, 7), points="blk.{0,1,2}.{v,Vcur}"))
    points = read(out).points
    for layer, heads in enumerate((2, 1, 4)):
        values, named = points[f"blk.{layer}.v"], points[f"blk.{layer}.Vcur"]
        assert values.shapes[0] == (heads * 32,)
        assert np.array_equal(values.values, named.values)
