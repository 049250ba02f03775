"""Small models by recipe: llama.cpp names their tensors and loads every one; options, seeds and types mean what they say."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, refused
from slow import slow_but

from checkpoints.errors import InputError
from checkpoints.gguf_file import contents
from engine.synth.recipe import parse_settings
from engine.synth.recipes import OF_ANY_SHAPE, RECIPES, names, recipe
from engine.weights.gguf_model import GgufModel
from reference.client import Reference

Q4_K, MXFP4 = 12, 39  # enum ggml_type


def test_the_list_names_every_recipe(parity: Cli) -> None:
    """`--architecture list` prints sixty architectures and more, one per line, without a file to write."""
    ran = parity("synth", "--architecture", "list")
    assert ran.code == 0
    assert ran.out.split() == names()
    assert len({recipe.architecture for recipe in RECIPES.values()}) >= 60


@pytest.mark.parametrize("name", OF_ANY_SHAPE)
def test_what_is_made_without_a_recipe_says_so(name: str) -> None:
    """qwen2 and llama, which the list names, have no recipe: the refusal says how they are made and does not offer them again."""
    with pytest.raises(InputError, match=f"{name} has no recipe") as refusal:
        recipe(name)
    assert "Use one of" not in str(refusal.value)


def test_options_are_found_in_the_file(parity: Cli) -> None:
    """Layers, width, heads, vocabulary, context, base, an untied output and --set are the file's; patterns follow the layers."""
    shape = "--layers 6 --width 96 --heads 6 --kv-heads 3 --head-size 32 --ff 160 --vocab 3000 --context 64 --rope-base 5000"
    given = ("--untied", "--set", "attention.sliding_window=5", "--set", "attention.layer_norm_rms_epsilon=0.5")
    assert parity("synth", "--architecture", "gemma4", *shape.split(), *given, "-o", "m.gguf").code == 0
    file = contents(Path("m.gguf"))
    values = {key.removeprefix("gemma4."): value.plain() for key, value in file.metadata.items()}
    assert (file.layers, values["embedding_length"], values["attention.head_count"]) == (6, 96, 6)
    assert (values["attention.head_count_kv"], values["attention.key_length"], values["attention.key_length_swa"]) == (
        3,
        32,
        16,
    )
    assert (values["context_length"], values["rope.freq_base"], values["attention.sliding_window"]) == (64, 5000.0, 5)
    assert values["attention.layer_norm_rms_epsilon"] == 0.5
    assert values["attention.sliding_window_pattern"] == [True, True, True, True, False, True]
    assert {tensor.name: tensor.ne for tensor in file.tensors}["output.weight"] == (96, 3000)


def test_heads_take_their_keys_along(parity: Cli) -> None:
    """Where a recipe has one key head for each query head, --heads changes both."""
    assert parity("synth", "--architecture", "olmo2", "--heads", "8", "-o", "m.gguf").code == 0
    assert contents(Path("m.gguf")).integer("olmo2.attention.head_count_kv") == 8


@pytest.mark.parametrize("architecture", slow_but(["mixtral", "mamba"], "mamba"))
def test_quantised_while_it_is_made(parity: Cli, reference: Reference, architecture: str) -> None:
    """Experts and recurrent layers: a file of type Q4_K_M has the bytes of llama.cpp's quantiser, run on the F32 file."""
    for kind in ("f32", "q4_k_m"):
        assert parity("synth", "--architecture", architecture, "--type", kind, "-o", f"{kind}.gguf").code == 0
    expected = reference.quantize(Path("f32.gguf").absolute(), "q4_k_m", Path("expected.gguf").absolute())
    assert Path("q4_k_m.gguf").read_bytes() == expected.read_bytes()


@pytest.mark.slow
def test_one_seed_is_one_file(parity: Cli) -> None:
    """Two runs with one seed write one file to the byte; another seed other weights, and the others' weights stay."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert parity("synth", "--architecture", "qwen3moe", "--layers", "1", "--seed", seed, "-o", name).code == 0
    a, b, c = (Path(name).read_bytes() for name in "abc")
    assert a == b != c
    assert parity("synth", "--architecture", "qwen3moe", "--layers", "1", "--seed", "1", "--untied", "-o", "d").code == 0
    before, after = GgufModel(Path("a")), GgufModel(Path("d"))
    np.testing.assert_array_equal(before.raw("blk.0.attn_q.weight"), after.raw("blk.0.attn_q.weight"))


@pytest.mark.slow
def test_types_are_llama_cpps(small_model: Callable[..., Path]) -> None:
    """gpt-oss has MXFP4 experts by itself; any file type of llama.cpp's can be asked for; norms stay F32."""
    types = {tensor.name: tensor.type for tensor in contents(small_model("gpt-oss", layers=2)).tensors}
    assert {types[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {MXFP4}
    assert types["blk.1.attn_norm.weight"] == 0
    types = {
        tensor.name: tensor.type for tensor in contents(small_model("granite", "q4_k_m", layers=1, width=256, ff=256)).tensors
    }
    assert types["blk.0.ffn_up.weight"] == Q4_K


def test_q_k_v_in_one_tensor(small_model: Callable[..., Path]) -> None:
    """phi3's Q, K and V are one tensor, rows of Q first, and none of the three is there besides."""
    shapes = {tensor.name: tensor.ne for tensor in contents(small_model("phi3", layers=1)).tensors}
    assert shapes["blk.0.attn_qkv.weight"] == (128, (4 + 2 + 2) * 32)
    assert not [name for name in shapes if ".attn_q." in name or ".attn_k." in name or ".attn_v." in name]


def test_wrong_requests(parity: Cli) -> None:
    """Unknown architectures (with the list), types, shapes and settings, and --like, are one line each; no file is left."""
    for arguments, message in (
        (("--architecture", "gpt-5"), "Use one of afmoe, apertus,"),
        (("--architecture", "qwen3", "--type", "q9_9"), "q9_9"),
        (("--architecture", "granite", "--width", "130"), "not a multiple of 4 heads"),
        (("--architecture", "qwen3", "--kv-heads", "3"), "4 heads cannot share 3"),
        (("--architecture", "qwen3", "--like", "tiny"), "--like is for shapes of qwen2 and llama"),
        (("--architecture", "qwen3", "--set", "expert_count"), "has no value"),
        (("--architecture", "qwen3", "--set", "block_count=text"), "block_count"),
        (("--architecture", "qwen3", "--vocab", "100"), "vocabulary only 100"),
        (("--architecture", "gptneox", "--tied"), "output.weight"),
        (("--set", "rope.freq_base=1"), "--set works with --architecture only"),
    ):
        refused(parity("synth", *arguments, "-o", "m.gguf"), message)
        assert not list(Path().iterdir())
    refused(parity("synth", "--architecture", "qwen3", "-o", "/proc/m.gguf"), "cannot write")
    refused(parity("synth", "--architecture", "qwen3"), "-o FILE")


def test_settings_are_typed_as_they_are_written() -> None:
    """true, 3, 3.0, a list and a word are a bool, an integer, a float, a list and a text; a mapping is refused."""
    given = ("a=true", "b=3", "c=3.0", "d=[1, 2]", "e=yarn", "f=1e-5")
    assert parse_settings(given) == {"a": True, "b": 3, "c": 3.0, "d": [1, 2], "e": "yarn", "f": 1e-5}
    with pytest.raises(InputError, match="not a metadata value"):
        parse_settings(['a={"b": 1}'])


_TIMES = {"nanbeige-loops": 2, "hrm_text": 6}  # a pass goes through these models' layers several times


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_llama_cpp_loads_every_recipe(small_model: Callable[..., Path], name: str) -> None:
    """Every recipe makes a file that llama.cpp has loaded, with the layers asked for, each as often as the model computes it."""
    file = contents(small_model(name))
    assert file.architecture == RECIPES[name].architecture
    assert file.layers == RECIPES[name].shape.layers * _TIMES.get(name, 1)
