"""Synthetic models: llama.cpp loads them, they are what was asked for, and the same seed gives the same file."""

from pathlib import Path

import pytest

from checkpoints.errors import InputError
from cli import Cli
from engine.gguf_model import GgufModel
from engine.synth import PRESETS, shape_like, synthesize


def test_the_file_has_the_shape_asked_for(parity: Cli) -> None:
    """Every option is found again in the file's metadata and tensors."""
    arguments = "--like tiny-llama --layers 3 --width 96 --heads 6 --kv-heads 3 --head-size 32 --ff 160 --vocab 3000 --tied --type q8_0"
    assert parity("synth", *arguments.split(), "--context", "64", "--rope-base", "5000", "-o", "m.gguf").code == 0
    hp = GgufModel(Path("m.gguf")).hyperparameters
    assert (hp.architecture, hp.n_layers, hp.n_embd, hp.n_heads, hp.n_kv_heads, hp.head_size) == ("llama", 3, 96, 6, 3, 32)
    assert (hp.n_ff, hp.n_vocab, hp.n_ctx_train, hp.rope_base, hp.file_type) == (160, 3000, 64, 5000.0, "Q8_0")
    assert parity("run", "--model", "m.gguf", "--prompt", "Once").code == 0


def test_a_type_that_only_llama_cpp_makes(parity: Cli) -> None:
    """Q4_K_M is quantised by llama.cpp from F32, and runs."""
    assert parity("synth", "--width", "256", "--ff", "256", "--type", "q4_k_m", "-o", "m.gguf").code == 0
    assert GgufModel(Path("m.gguf")).hyperparameters.file_type == "Q4_K_M"
    assert parity("run", "--model", "m.gguf", "--prompt", "Once").code == 0
    assert sorted(path.name for path in Path().glob("m.*")) == ["m.gguf"]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """Two runs with one seed write one file; another seed writes another."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthesize(tmp_path / name, shape_like("tiny", layers=1, vocab=16), seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 6}, "6 heads cannot share 4"),
        ({"width": 66}, "no multiple"),
        ({"head_size": 15}, "pairs"),
        ({"layers": 0}, "layers"),
        ({"architecture": "gemma3"}, "qwen2 and llama"),
    ],
)
def test_impossible_shapes(changes: dict, said: str) -> None:
    """A shape that no engine could run is refused with the reason."""
    with pytest.raises(InputError, match=said):
        shape_like("tiny-llama", **({"kv_heads": 4, "width": 96} | changes))


def test_wrong_requests(parity: Cli) -> None:
    """Unknown shapes and types, a vocabulary smaller than the tokenizer and an unwritable file are one line each."""
    for arguments, said in (
        (("--like", "gpt-5"), "there is no shape"),
        (("--type", "q9_9"), "q9_9"),
        (("--vocab", "100"), "vocabulary only 100"),
        (("--width", "40", "--heads", "2", "--type", "q8_0"), "blocks of 32"),
    ):
        ran = parity("synth", *arguments, "-o", "m.gguf")
        assert (ran.code, len(ran.err.splitlines())) == (2, 1), ran
        assert said in ran.err
        assert not Path("m.gguf").exists()
    assert parity("synth", "-o", "/proc/m.gguf").code == 2


def test_presets_are_possible_shapes() -> None:
    """Every named shape passes its own check."""
    for name in PRESETS:
        shape_like(name)
