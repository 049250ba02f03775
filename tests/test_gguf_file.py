"""Our GGUF reader against gguf-py's, and against files that were damaged on purpose."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_writing import finish
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from checkpoints.errors import ModelError
from checkpoints.gguf_file import contents, header_bytes
from checkpoints.gguf_values import Value, string_value, uint32_value
from engine.models import written_by_hand
from engine.weights.gguf_model import GgufModel


def test_metadata_and_tensors_equal_gguf_py(stories: Path) -> None:
    """Every key, scalar, array and tensor place is what gguf-py's reader finds."""
    reader = gguf.GGUFReader(stories)
    ours = contents(stories)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: value.plain() for key, value in ours.metadata.items()} == theirs
    model = GgufModel(stories)
    assert list(model.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = model.tensors[tensor.name]
        assert info.shape == tuple(reversed([int(n) for n in tensor.shape]))
        assert (info.type, info.n_bytes, info.offset) == (int(tensor.tensor_type), int(tensor.n_bytes), int(tensor.data_offset))
        np.testing.assert_array_equal(model.raw(tensor.name).ravel(), tensor.data.view(np.uint8).ravel())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny valid model, so that a mutation is likely to hit something."""
    from engine.synth import shape_like, synthesize

    path = tmp_path_factory.mktemp("small") / "small.gguf"
    synthesize(path, shape_like("tiny", layers=1, vocab=8, context=16), weight_type="q8_0")
    return path


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_is_more_than_one_clear_error(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes of the header are changed or cut, the model opens or a ModelError says why; nothing else."""
    whole = bytearray(small.read_bytes())
    head = contents(small).data
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, head - 1))
        whole[place : place + 1] = data.draw(st.binary(min_size=0, max_size=9))
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(whole[: data.draw(st.integers(0, len(whole)))]) if data.draw(st.booleans()) else bytes(whole))
    message = ""
    try:
        model = GgufModel(path)
        for name in model.tensors:
            model.raw(name)
    except ModelError as error:
        message = str(error)
    assert "\n" not in message


def test_absurd_counts_take_no_memory_and_no_time(tmp_path: Path) -> None:
    """2^60 values or tensors in a file of 40 bytes are refused at once."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + np.array([3], "<u4").tobytes() + np.array([0, 2**60, 1, 2], "<u8").tobytes())
    with pytest.raises(ModelError, match="than fit into"):
        GgufModel(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("split.count", 4, "4 parts of a split model"),
        ("tiny.attention.head_count_kv", [2.0, 0.5], "other than whole numbers"),
        ("tiny.embedding_length", "wide", "not a whole number"),
        ("tiny.block_count", None, "tiny.block_count"),
    ],
)
def test_metadata_that_no_engine_can_use(tmp_path: Path, key: str, value: object, message: str) -> None:
    """Missing or contradicting metadata are named by their key or their meaning."""
    with pytest.raises(ModelError, match=message):
        GgufModel(tiny(tmp_path / "m.gguf", key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tiny.rope.scaling.type", "yarn", "yarn"),
        ("tiny.attention.head_count_kv", [2, 4], "differs from layer to layer"),
        ("tiny.attention.head_count", 5, "do not fit together"),
        ("tiny.attention.head_count", 0, "0 heads"),
        ("tiny.rope.dimension_count", 7, "rotary"),
        ("tiny.expert_count", 8, "mixture of experts"),
    ],
)
def test_metadata_that_no_written_list_has(tmp_path: Path, key: str, value: object, message: str) -> None:
    """What lists of steps written by hand don't have is said, and no reason to refuse the file: the graph may have it."""
    hyperparameters = GgufModel(tiny(tmp_path / "m.gguf", key, value)).hyperparameters
    assert message in hyperparameters.irregular
    assert not written_by_hand(replace(hyperparameters, architecture="qwen2"), {})


def tiny(path: Path, key: str, value: object) -> Path:
    """A model of one tensor with this key in its metadata."""
    keys: dict[str, object] = {
        "tiny.block_count": 2,
        "tiny.context_length": 16,
        "tiny.embedding_length": 64,
        "tiny.feed_forward_length": 64,
        "tiny.attention.head_count": 4,
    } | {key: value}
    writer = gguf.GGUFWriter(path, "tiny")
    for name, content in keys.items():
        if isinstance(content, list):
            writer.add_array(name, content)
        elif isinstance(content, str):
            writer.add_string(name, content)
        elif content is not None:
            writer.add_uint32(name, content)
    writer.add_tensor("token_embd.weight", np.zeros((4, 64), dtype=np.float32))
    finish(writer)
    return path


@pytest.mark.parametrize(
    ("values", "places", "message"),
    [
        ({"general.alignment": uint32_value(3)}, {}, "its alignment is 3, not a power of two"),
        ({"general.alignment": string_value("32")}, {}, "its alignment is '32', not a power of two"),
        ({"general.architecture": string_value("")}, {}, "general.architecture is empty"),
        ({"general.architecture": string_value("a" * 9000)}, {}, "general.architecture has 9,000 characters"),
        ({"general.architecture": string_value("other")}, {}, "the metadata have no other."),
        ({"qwen2.context_length": string_value("long")}, {}, "qwen2.context_length is 'long', which is not a whole number"),
        ({}, {1: 0}, "begins at byte 0 of the data, but the tensors before it end at byte"),
        ({}, {2: 1 << 60}, "begins at byte 1,152,921,504,606,846,976 of the data, but the tensors before it end at byte"),
    ],
)
def test_tables_of_contents_that_no_loader_takes(
    small: Path, tmp_path: Path, values: dict[str, Value], places: dict[int, int], message: str
) -> None:
    """An alignment that is none, tensors that overlap or leave a gap, keys of another type: refused as llama.cpp refuses them."""
    whole = contents(small)
    tensors = [replace(tensor, offset=places.get(number, tensor.offset)) for number, tensor in enumerate(whole.tensors)]
    path = tmp_path / "m.gguf"
    path.write_bytes(header_bytes(whole.metadata | values, tensors) + small.read_bytes()[whole.data :])
    with pytest.raises(ModelError) as raised:
        GgufModel(path)
    assert message in str(raised.value)


def test_a_number_of_heads_that_is_missing_is_said(small: Path, tmp_path: Path) -> None:
    """A key that no loader can do without: it is not there, rather than None."""
    whole = contents(small)
    metadata = {key: value for key, value in whole.metadata.items() if not key.endswith("attention.head_count")}
    path = tmp_path / "m.gguf"
    path.write_bytes(header_bytes(metadata, list(whole.tensors)) + small.read_bytes()[whole.data :])
    with pytest.raises(ModelError, match=r"the metadata have no qwen2\.attention\.head_count\."):
        GgufModel(path).hyperparameters  # noqa: B018


def test_a_tensor_without_a_name_is_refused(small: Path, tmp_path: Path) -> None:
    """llama.cpp leaves it out of a copy, and the copy was blamed on the disk: it is said of the file."""
    whole = contents(small)
    nameless = [replace(entry, name="") if number == 2 else entry for number, entry in enumerate(whole.tensors)]
    path = tmp_path / "m.gguf"
    path.write_bytes(header_bytes(whole.metadata, nameless) + small.read_bytes()[whole.data :])
    with pytest.raises(ModelError, match="tensor 2 has no name"):
        contents(path)


def test_a_key_that_occurs_twice_is_refused(small: Path, tmp_path: Path) -> None:
    """Of two values of one key none is taken, as llama.cpp takes none."""
    whole = contents(small)
    header = header_bytes(whole.metadata, list(whole.tensors))
    value = whole.metadata["general.architecture"]
    entry = string_value("general.architecture").raw + struct.pack("<I", value.type) + value.raw
    path = tmp_path / "m.gguf"
    path.write_bytes(header[:16] + struct.pack("<Q", len(whole.metadata) + 1) + entry + header[24:])
    with pytest.raises(ModelError, match=r"it has two values named 'general\.architecture'"):
        GgufModel(path)
