"""What an engine learns from a GGUF file, and the one clear error of each that is wrong (the container: test_gguf_file.py)."""

import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_writing import finish
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.errors import ModelError
from engine.ops import rope_angles
from engine.weights.gguf_model import FILE_TYPES, GgufModel


def write(path: Path, change: Callable[[gguf.GGUFWriter], None] = lambda _: None, skip: tuple[str, ...] = ()) -> Path:
    """A small llama with each kind of metadata; `change` adds to it, `skip` leaves out metadata (or "tensors")."""
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64}
    numbers |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    for key, number in numbers.items():
        if key not in skip:
            writer.add_uint32(f"llama.{key}", number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_name("Kleines Modell ☺")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_token_list(["a", "bb", "ccc"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_token_types([1, 2, 3])
    change(writer)
    if "tensors" not in skip:
        rng = np.random.default_rng(0)
        writer.add_tensor("token_embd.weight", rng.standard_normal((3, 32)).astype(np.float32))
        writer.add_tensor("blk.0.attn_q.weight", rng.standard_normal((32, 32)).astype(np.float16))
        writer.add_tensor("blk.0.attn_k.weight", rng.standard_normal((16, 32)).astype(np.float16))
        writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, dtype=np.float32))
    finish(writer)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of such a model."""
    return write(tmp_path_factory.mktemp("small") / "model.gguf").read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for damaged files, written over and over."""
    return tmp_path_factory.mktemp("damaged") / "model.gguf"


def use(path: Path) -> None:
    """Do everything that a run does with a file."""
    model = GgufModel(path)
    for key in model.metadata:
        model.array(key)
    for name, info in model.tensors.items():
        if np.prod(info.shape) < 1e6:
            model.load(name)
    assert model.fingerprint


def test_hyperparameters_are_the_metadata(stories: Path) -> None:
    """The engine's numbers of the embedded model are those of the file, by their full keys."""
    hp = GgufModel(stories).hyperparameters
    fields = gguf.GGUFReader(stories).fields

    def theirs(key: str) -> Any:
        return fields[f"qwen2.{key}"].contents()

    assert (hp.architecture, hp.file_type) == ("qwen2", "Q8_0")
    assert hp.n_layers == theirs("block_count")
    assert (hp.n_embd, hp.n_ff) == (theirs("embedding_length"), theirs("feed_forward_length"))
    assert (hp.n_heads, hp.n_kv_heads) == (theirs("attention.head_count"), theirs("attention.head_count_kv"))
    assert (hp.eps, hp.rope_base) == (theirs("attention.layer_norm_rms_epsilon"), theirs("rope.freq_base"))
    assert hp.n_vocab == len(fields["tokenizer.ggml.tokens"].contents())
    assert hp.head_size == hp.value_size == hp.rope_dims == hp.n_embd // hp.n_heads


def test_values_are_read_by_name_and_by_row(tmp_path: Path) -> None:
    """float32 and float16 weights come back as written, whole and row by row, in any order and repeated."""
    model = GgufModel(write(tmp_path / "model.gguf"))
    reader = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, expected in reader.items():
        np.testing.assert_array_equal(model.load(name), expected)
        assert model.load(name).dtype == np.float32
    rows = np.array([2, 0, 2])
    np.testing.assert_array_equal(model.load_rows("token_embd.weight", rows), reader["token_embd.weight"][rows])


def test_what_is_not_the_default_is_taken_from_the_file(tmp_path: Path) -> None:
    """Head sizes, rotary dimensions, base and linear scaling come from the file where it has them."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(16)
        writer.add_value_length(24)
        writer.add_rope_dimension_count(12)
        writer.add_rope_freq_base(5e5)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    hp = GgufModel(write(tmp_path / "model.gguf", change)).hyperparameters
    assert (hp.head_size, hp.value_size, hp.rope_dims, hp.rope_base, hp.rope_scale) == (16, 24, 12, 5e5, 0.25)
    plain = GgufModel(write(tmp_path / "plain.gguf")).hyperparameters
    assert (plain.head_size, plain.value_size, plain.rope_dims, plain.rope_base, plain.rope_scale) == (8, 8, 8, 1e4, 1.0)


@pytest.mark.parametrize("damage", ["base", "factor"])
def test_a_rope_without_angles_is_refused(tmp_path: Path, damage: str) -> None:
    """A base or a factor so small that no angle is a float32 is damage, not a divergence."""

    def change(writer: gguf.GGUFWriter) -> None:
        if damage == "base":
            writer.add_rope_freq_base(1e-45)
        else:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(1e-45)

    with pytest.raises(ModelError, match="is not usable"):
        GgufModel(write(tmp_path / "model.gguf", change))


def test_angles_beyond_float32_have_no_cosine() -> None:
    """NaN, as in ggml, and no warning of NumPy's."""
    cosine, sine = rope_angles(np.arange(8) * 1000, 64, base=1e-38)
    assert np.isnan(cosine[-1, -1])
    assert np.isnan(sine[-1, -1])


def test_numbers_given_once_a_layer(tmp_path: Path) -> None:
    """A list of equal numbers, one per layer, is that number; of different ones the largest is said, and that they differ."""
    skip = ("attention.head_count_kv", "feed_forward_length")

    def change(heads: list[int]) -> Callable[[gguf.GGUFWriter], None]:
        def add(writer: gguf.GGUFWriter) -> None:
            writer.add_array("llama.attention.head_count_kv", heads)
            writer.add_array("llama.feed_forward_length", [64, 64])

        return add

    hp = GgufModel(write(tmp_path / "same.gguf", change([2, 2]), skip)).hyperparameters
    assert (hp.n_kv_heads, hp.n_ff) == (2, 64)
    hp = GgufModel(write(tmp_path / "different.gguf", change([2, 4]), skip)).hyperparameters
    assert hp.n_kv_heads == 4
    assert "head_count_kv differs from layer to layer" in hp.irregular


@pytest.mark.parametrize(
    ("change", "skip", "message"),
    [
        (None, ("embedding_length",), "no llama.embedding_length"),
        (None, ("tensors",), "tokenizer but no tensors"),
        (lambda w: w.add_uint16("split.count", 3), (), "3 parts of a split model"),
        (lambda w: w.add_bool("llama.block_count", True), ("block_count",), "block_count is True"),
        (lambda w: w.add_uint32("llama.block_count", 0), ("block_count",), "it has no layers"),
        (lambda w: w.add_float32("llama.rope.freq_base", float("nan")), ("freq_base",), "a RoPE base of nan"),
        (lambda w: w.add_float32("llama.rope.freq_base", -1.0), ("freq_base",), "a RoPE base of -1.0"),
    ],
)
def test_metadata_that_no_engine_can_use(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter], None] | None, skip: tuple[str, ...], message: str
) -> None:
    """Missing or contradictory metadata are named, with what to do about them."""
    path = write(tmp_path / "model.gguf", change or (lambda _: None), skip)
    with pytest.raises(ModelError, match=message) as error:
        GgufModel(path)
    assert error.value.advice


HEADS = {
    "empty": (b"", "is empty"),
    "another format": (b"PK\x03\x04" + bytes(64), "begins with 50 4b 03 04, not "),
    "magic alone": (b"GGUF", "cut short"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "version 99": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "a key of 2^63 bytes": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(64), "cut short"),
    "a list of 2^61 texts": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**61) + bytes(64),
        "cut short",
    ),
    "a list in a list": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1) + bytes(64),
        "array of unknown type 9",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_files_that_are_no_model(scratch: Path, name: str) -> None:
    """Each wrong beginning is named at once, whatever the counts in it claim."""
    content, message = HEADS[name]
    scratch.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        GgufModel(scratch)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    """A path that is not there and a folder are told apart."""
    with pytest.raises(ModelError, match="No such file"):
        GgufModel(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="is a folder"):
        GgufModel(tmp_path)


def test_tensors_that_contradict_the_file(small: bytes, scratch: Path) -> None:
    """Two tensors of a name, an offset after the end, an unknown type and a row of half a block are each named."""
    at = small.index(b"token_embd.weight") + len(b"token_embd.weight")  # then: dimensions, ne[2], type, offset

    def patched(content: bytes, place: int, layout: str, value: int) -> bytes:
        raw = struct.pack(layout, value)
        return content[:place] + raw + content[place + len(raw) :]

    # Q8_0 rows of 33: the first of the two numbers is ggml's ne[0], the row.
    half_block = patched(patched(small, at + 4, "<Q", 33), at + 20, "<I", 8)
    wrong = {
        "begins at byte 1,099,511,627,776": patched(small, at + 24, "<Q", 2**40),
        "unknown type 77": patched(small, at + 20, "<I", 77),
        "blocks of 32": half_block,
        "has 9 dimensions": patched(small, at, "<I", 9),
        "two tensors named 'blk.0.attn_q.weight'": small.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"),
    }
    for message, content in wrong.items():
        scratch.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            GgufModel(scratch)


def test_every_truncation_is_one_clear_error(small: bytes, scratch: Path) -> None:
    """A file cut at any place, in header, list or weights, raises ModelError and nothing else."""
    for size in range(0, len(small), 7):
        scratch.write_bytes(small[:size])
        with pytest.raises(ModelError):
            GgufModel(scratch)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None)
def test_damaged_bytes_never_raise_anything_else(small: bytes, scratch: Path, seed: int) -> None:
    """Bytes overwritten anywhere in the header give a model or a ModelError, and no warning."""
    rng = random.Random(seed)
    content = bytearray(small)
    header = small.index(b"blk.0.attn_norm.weight") + 64
    extremes = [0, 1, 8, 9, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        raw = struct.pack("<Q", rng.choice(extremes))[: rng.choice([4, 8])] if rng.random() < 0.5 else rng.randbytes(1)
        place = rng.randrange(4, header)
        content[place : place + len(raw)] = raw
    scratch.write_bytes(content)
    with suppress(ModelError):  # a count that is believed takes for ever
        use(scratch)


@pytest.mark.slow
def test_a_large_vocabulary_opens_whole(synthetic: Callable[..., Path]) -> None:
    """A vocabulary of 151,936 tokens is there to its last one (benchmarks/cpu.py measures how quickly)."""
    path = synthetic("tiny", "f16", vocab=151936, layers=1)
    model = GgufModel(path)
    tokens = model.array("tokenizer.ggml.tokens")
    assert (len(tokens), tokens[-1]) == (151936, "<|pad_151935|>")


def test_file_types_are_named_as_gguf_py_names_them() -> None:
    """Each number of our short table of file types has gguf-py's name."""
    theirs = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    assert FILE_TYPES.items() <= theirs.items()
