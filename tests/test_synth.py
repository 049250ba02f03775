"""Synthetic models: llama.cpp loads and computes them, they are what was asked for, and the same seed gives the same file."""

import os
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
from cli import Cli
from slow import slow_but

from checkpoints.errors import InputError
from engine import backend
from engine.synth import PRESETS, shape_like, synthesize
from engine.synth.data import PORTION, append, converted
from engine.synth.dense import check_size
from engine.synth.shape import tensors_of
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.synth.synthetic import make
from reference.client import Reference

TOKENS = [1, 2, 3, 500, 77, 4, 31]
TYPES = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
# Parameters as the models' cards and config.json files have them; Llama 3 has 32 frequency factors more here, since
# llama.cpp's files carry them as a tensor.
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400 + 32,
    "llama-3.1-8b": 8_030_261_248 + 64,
}


def test_the_file_has_the_shape_asked_for(parity: Cli) -> None:
    """Every option is found again in the file's metadata and tensors."""
    arguments = (
        "--like tiny-llama --layers 3 --width 96 --heads 6 --kv-heads 3 --head-size 32 --ff 160 --vocab 3000 --tied --type q8_0"
    )
    assert parity("synth", *arguments.split(), "--context", "64", "--rope-base", "5000", "-o", "m.gguf").code == 0
    hp = GgufModel(Path("m.gguf")).hyperparameters
    assert (hp.architecture, hp.n_layers, hp.n_embd, hp.n_heads, hp.n_kv_heads, hp.head_size) == ("llama", 3, 96, 6, 3, 32)
    assert (hp.n_ff, hp.n_vocab, hp.n_ctx_train, hp.rope_base, hp.file_type) == (160, 3000, 64, 5000.0, "Q8_0")
    assert parity("run", "--model", "m.gguf", "--prompt", "Once").code == 0


@pytest.mark.slow
def test_a_type_that_only_llama_cpp_makes(parity: Cli) -> None:
    """Q4_K_M is quantised by llama.cpp from F32, and runs."""
    assert parity("synth", "--width", "256", "--ff", "256", "--type", "q4_k_m", "-o", "m.gguf").code == 0
    assert GgufModel(Path("m.gguf")).hyperparameters.file_type == "Q4_K_M"
    assert parity("run", "--model", "m.gguf", "--prompt", "Once").code == 0
    assert sorted(path.name for path in Path().glob("m.*")) == ["m.gguf"]


@pytest.mark.parametrize("kind", slow_but(["q4_k_m", "q2_k", "iq4_xs", "tq1_0"], "q2_k", "tq1_0"))
def test_quantised_while_it_is_made(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stories: Path, kind: str
) -> None:
    """A file whose rows are quantised as they are made has the bytes of llama.cpp's quantiser, run on the F32 file of that seed."""
    shape = shape_like("llama-3.1-8b", layers=3, width=256, heads=8, kv_heads=2, head_size=32, ff=512, vocab=2100)
    synthesize(tmp_path / "f32.gguf", shape, weight_type="f32", seed=4, tokenizer=stories)
    expected = reference.quantize(tmp_path / "f32.gguf", kind, tmp_path / "expected.gguf")
    # Eleven rows of 256: no tensor's rows are a multiple of that. Portions of the real size would need a matrix that takes a minute.
    monkeypatch.setattr("engine.synth.data.PORTION", 3000)
    make(tmp_path / "m.gguf", shape, kind=kind, seed=4, tokenizer=stories)
    assert (tmp_path / "m.gguf").read_bytes() == expected.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"f32.gguf", "expected.gguf", "m.gguf"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "q4_k_m"])
def test_drawn_from_blocks(parity: Cli, kind: str) -> None:
    """With --blocks, weights have the scale that they have without; rows and layers differ, seeds too, and our engine agrees."""
    shape = ("--layers", "2", "--width", "1024", "--ff", "1024", "--type", kind)
    for name, given in (
        ("whole", ()),
        ("a", ("--blocks", "500")),
        ("b", ("--blocks", "500")),
        ("c", ("--blocks", "500", "--seed", "1")),
    ):
        assert parity("synth", *shape, *given, "-o", f"{name}.gguf").code == 0
    a, b, c = (Path(f"{name}.gguf").read_bytes() for name in "abc")
    assert a == b != c
    whole, drawn = GgufModel(Path("whole.gguf")), GgufModel(Path("a.gguf"))
    assert {name: (info.shape, info.type) for name, info in whole.tensors.items()} == {
        name: (info.shape, info.type) for name, info in drawn.tensors.items()
    }
    for name, info in whole.tensors.items():
        if len(info.shape) == 2:
            # The deviation of 500 · 256 weights is known to 0.2 %; the smallest matrix here has 262,144.
            assert drawn.load(name).std() == pytest.approx(whole.load(name).std(), rel=0.02)
            assert len(np.unique(drawn.load(name), axis=0)) == len(whole.load(name))
        else:
            np.testing.assert_array_equal(drawn.load(name), whole.load(name))
    first, second = (drawn.load(f"blk.{layer}.attn_q.weight") for layer in (0, 1))
    assert not (first == second).all(axis=1).any()
    assert parity("run", "--model", "a.gguf", "--prompt", "Once").code == 0
    assert parity("synth", "--architecture", "gemma3", "--blocks", "500", "-o", "d.gguf").code == 2


def test_a_type_that_needs_an_importance_matrix(parity: Cli) -> None:
    """IQ2_XXS cannot be made without one: the line says which tensor needs it, and no file is left."""
    ran = parity("synth", "--width", "256", "--ff", "256", "--type", "iq2_xxs", "-o", "m.gguf")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1), ran
    assert "importance matrix" in ran.err
    assert not list(Path().iterdir())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """Two runs with one seed write one file; another seed writes another."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthesize(tmp_path / name, shape_like("tiny", layers=1, vocab=16), seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 6}, "6 heads cannot share 4"),
        ({"width": 66}, "not a multiple"),
        ({"head_size": 15}, "pairs"),
        ({"layers": 0}, "layers"),
        ({"architecture": "gemma3"}, "qwen2 and llama"),
        ({"architecture": "qwen2", "head_size": 32}, "width / heads only"),
        ({"rope_dims": 10}, "rotates whole heads"),
    ],
)
def test_impossible_shapes(changes: dict, message: str) -> None:
    """A shape that no engine could run is refused with the reason."""
    with pytest.raises(InputError, match=message):
        shape_like("tiny-llama", **({"kv_heads": 4, "width": 96} | changes))


def test_wrong_requests(parity: Cli) -> None:
    """Unknown shapes and types, a vocabulary smaller than the tokenizer and an unwritable file are one line each."""
    for arguments, message in (
        (("--like", "gpt-5"), "there is no shape"),
        (("--type", "q9_9"), "q9_9"),
        (("--vocab", "100"), "vocabulary only 100"),
        (("--width", "40", "--heads", "2", "--type", "q8_0"), "blocks of 32"),
    ):
        ran = parity("synth", *arguments, "-o", "m.gguf")
        assert (ran.code, len(ran.err.splitlines())) == (2, 1), ran
        assert message in ran.err
        assert not Path("m.gguf").exists()
    assert parity("synth", "-o", "/proc/m.gguf").code == 2


def test_presets_are_possible_shapes() -> None:
    """Every named shape passes its own check."""
    for name in PRESETS:
        shape_like(name)


def ours(path: Path) -> np.ndarray:
    """Our engine's logits of the last token."""
    engine = Transformer(GgufModel(path), backend.choose("numpy"))
    return engine.forward(TOKENS, engine.start())


def theirs(reference: Reference, path: Path, mode: str) -> dict[str, np.ndarray]:
    """Every value of llama.cpp's pass over the tokens."""
    return {node.point: value for node, value in reference.capture(path, TOKENS, None, mode)}


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum((a.astype(np.float64) - b) ** 2) / np.sum(b.astype(np.float64) ** 2))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("like", ["tiny", "tiny-llama"])
def test_llama_cpp_loads_and_computes_every_type(
    reference: Reference, synthetic: Callable[..., Path], like: str, kind: str
) -> None:
    """Both architectures in every type: llama.cpp computes the file itself, and on its F32 twin equals our engine.

    1e-9 is exact mode's limit for logits (parity/diff/limits.py).
    """
    path = synthetic(like, kind)
    assert np.isfinite(theirs(reference, path, "native")["logits"]).all()
    assert nmse(ours(path), theirs(reference, path, "exact")["logits"][-1]) < 1e-9


@pytest.mark.parametrize(
    ("like", "shape"),
    [
        ("tiny", {"tied": True}),
        ("tiny", {"heads": 14, "kv_heads": 2, "width": 448}),
        ("tiny-llama", {"tied": True, "head_size": 32}),
        ("tiny-llama", {"head_size": 48, "rope_dims": 48, "biases": True}),
        ("tiny-llama", {"rope_factors": True, "heads": 3, "kv_heads": 3, "width": 96}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_llama_cpp_loads_and_computes_odd_shapes(
    reference: Reference, synthetic: Callable[..., Path], like: str, shape: dict[str, object]
) -> None:
    """Tied outputs, heads of another size than width / heads, biases, factors: the same as our engine."""
    path = synthetic(like, "q8_0", **shape)
    assert ("output.weight" in GgufModel(path).tensors) is not shape.get("tied", False)
    assert nmse(ours(path), theirs(reference, path, "exact")["logits"][-1]) < 1e-9


def test_the_weights_are_those_asked_for(tmp_path: Path) -> None:
    """A file of type Q8_0 holds gguf-py's quantisation of the F32 file of the same seed; another seed is another model."""
    shape = shape_like("tiny", layers=1)
    plain, quantised, other = tmp_path / "f32.gguf", tmp_path / "q8_0.gguf", tmp_path / "other.gguf"
    assert synthesize(plain, shape, weight_type="f32", seed=3) == plain.stat().st_size
    synthesize(quantised, shape, weight_type="q8_0", seed=3)
    synthesize(other, shape, weight_type="f32", seed=4)
    models = [GgufModel(path) for path in (plain, quantised, other)]
    for name, info in models[0].tensors.items():
        weight = models[0].load(name)
        stored = gguf.GGMLQuantizationType(models[1].tensors[name].type)
        assert stored == (gguf.GGMLQuantizationType.Q8_0 if len(info.shape) == 2 else gguf.GGMLQuantizationType.F32)
        expected = gguf.quants.quantize(weight, stored).view(np.uint8)
        np.testing.assert_array_equal(models[1].raw(name).ravel(), expected.ravel())
        assert not np.array_equal(weight, models[2].load(name))


@pytest.mark.parametrize("like", PARAMETERS)
def test_presets_have_the_models_parameters(like: str) -> None:
    """A preset has exactly as many parameters as the model it is named after."""
    assert sum(prod(dims) for _, dims in tensors_of(PRESETS[like])) == PARAMETERS[like]


def test_hidden_states_stay_sane(reference: Reference, synthetic: Callable[..., Path]) -> None:
    """In 24 layers the residual stream neither dies nor explodes, and attention neither looks at one token nor at all alike."""
    states = theirs(reference, synthetic("tiny", "f32", layers=24, width=128), "exact")
    spread = [float(np.std(states[f"blk.{i}.l_out"])) for i in range(24)]
    assert min(spread) > 0.01
    assert max(spread) < 100
    assert 0.1 < np.std(states["logits"]) < 100
    last = np.stack([states[f"blk.{i}.kq_soft_max"][:, -1, :] for i in range(24)])
    assert 1.2 / len(TOKENS) < last.max(axis=-1).mean() < 0.95


def test_a_tokenizer_is_copied_and_padded(reference: Reference, synthetic: Callable[..., Path], stories: Path) -> None:
    """With the stories tokenizer in a larger vocabulary llama.cpp tokenizes as with the stories model."""
    path = synthetic("tiny", "f16", vocab=5000)
    text = "Once upon a time, there was a little girl named Lily."
    assert reference.tokenize(path, text).ids == reference.tokenize(stories, text).ids
    assert GgufModel(path).array("tokenizer.ggml.tokens")[-1] == "<|pad_4999|>"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is played by /dev/full")
def test_a_full_disk_is_noticed_at_the_last_tensor() -> None:
    """Weights so few that they only reach a buffer are not lost without an error."""
    few = converted(8, 0, lambda: iter([np.ones((1, 8), np.float32)]), lambda rows, _: rows)  # 32 bytes: nothing is padded
    with pytest.raises(OSError, match="No space left"):
        append(Path("/dev/full"), [few])


def test_a_store_of_blocks_counts_as_memory(tmp_path: Path) -> None:
    """A store that the memory cannot hold is refused before anything is written, in types that gguf-py makes too."""
    for kind in ("f16", "q6_k"):
        make(tmp_path / "small.gguf", shape_like("tiny"), kind=kind, blocks=10)
        (tmp_path / "small.gguf").unlink()
        with pytest.raises(InputError, match="of memory"):
            make(tmp_path / "m.gguf", shape_like("tiny"), kind=kind, blocks=1 << 40)  # a petabyte
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cores", [1, 2])
def test_the_portions_of_all_cores_count_as_memory(tmp_path: Path, cores: int) -> None:
    """What a core holds counts once for each core and once more; a model whose matrices are small needs no more than these."""
    script = (
        f"import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}]); from engine.synth import shape_like; "
        "from engine.synth.dense import at_once; print(at_once(shape_like('tiny', vocab=65536), None), at_once(shape_like('tiny'), None))"
    )
    threads = min(cores, len(os.sched_getaffinity(0)))
    large, small = map(int, subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout.split())
    assert large == PORTION * (threads + 1)
    assert 0 < small < large
    with pytest.raises(InputError, match="of memory, but only"):
        check_size(tmp_path / "m.gguf", 0, 0, largest=1 << 50)
