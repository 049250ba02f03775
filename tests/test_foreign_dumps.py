"""Dumps of other engines' own debuggers: SGLang, TensorRT-LLM, Edge-LLM, llama-debug, vLLM, torch.save.

The .pt files in tests/logs were written by torch 2.13's own torch.save (tests/torch_make.py); nothing here needs torch.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints.errors import DumpError
from checkpoints.formats import load
from checkpoints.formats.pickled import Opaque
from checkpoints.formats.shards import joined
from checkpoints.formats.torch_file import contents
from checkpoints.mapping import read_mapping
from checkpoints.record import Dump
from engine.opened import open_engine
from engine.weights.gguf_model import GgufModel
from parity.diff.compare import Options, compare
from parity.models import embedded
from parity.run.ours import OursJob, dump

LOGS = Path(__file__).parent / "logs"
IDS = (1, 403, 407)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Dump:
    """Our engine on the same tokens, whole rows."""
    out = tmp_path_factory.mktemp("run") / "run.jsonl"
    dump(open_engine(GgufModel(embedded.path()), "numpy"), OursJob(out, IDS, points="all", slice_size=4096))
    return load(out)


def unpacked(name: str, folder: Path) -> Path:
    with zipfile.ZipFile(LOGS / f"{name}.zip") as archive:
        archive.extractall(folder)
    return folder


def same(dump: Dump, run: Dump) -> tuple[str, int]:
    """The verdict and the records compared, by exact limits."""
    verdict = compare(dump, run, Options(compute="f32"))
    return verdict.verdict, verdict.compared


def test_every_type_view_and_wrapper_of_torch_save(tmp_path: Path) -> None:
    """Each tensor of a real file is what was saved: all types, a transposed view, a window of a larger one, a parameter."""
    unpacked("torch-save", tmp_path)
    file = contents(tmp_path / "kinds.pt")
    right = np.arange(12).reshape(3, 4)
    for name in ("float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "float32", "parameter"):
        assert np.array_equal(file[name], right), name
    assert np.array_equal(file["transposed"], right)
    assert np.array_equal(file["window"], np.arange(40).reshape(4, 10)[:3, :4])
    assert np.array_equal(file["ordered"]["a"], right)
    assert file["size"] == (3, 4)
    assert file["dtype"] == Opaque("torch.float32")
    assert isinstance(file["float8"], Opaque)
    assert contents(tmp_path / "state.pt")["weight"].shape == (3, 4)
    assert list(load(tmp_path / "layer_0.pt").points) == ["blk.0.l_out"]


def test_sglang_dumper_with_two_ranks(tmp_path: Path, run: Dump) -> None:
    """Shards are joined by dims, by trying, or summed, copies are taken once: every record agrees with our engine's."""
    dump = load(unpacked("sglang-dumper", tmp_path))
    assert dump.header is not None
    assert dump.header.tokens == IDS
    names = {"embd", *(f"blk.0.{kind}" for kind in ("q", "kqv_out", "attn_out", "ffn_inp", "l_out", "hidden_after_mlp"))}
    assert set(dump.points) == names
    assert same(dump, run) == ("parity", 3 * 6)
    assert any("summed" in note for note in dump.notes)
    assert any("joined along axis 1" in note for note in dump.notes)


def test_sglang_tensor_hook(tmp_path: Path, run: Dump) -> None:
    """A file a pass, keyed by module: positions from the batch's information; logits stand in the next pass's file, and at the last
    token of their own.
    """
    dump = load(unpacked("sglang-hook", tmp_path))
    assert dump.points["logits"].token_idx.tolist() == [1]
    kinds = ("attn_norm", "attn_out", "ffn_norm", "ffn_out")
    assert {"embd", *(f"blk.0.{kind}" for kind in kinds), "output_norm", "logits"} <= set(dump.points)
    assert same(dump, run) == ("parity", 3 * 6 + 1)
    assert dump.points["embd"].step.tolist() == [0, 0, 1]


def test_sglang_dumper_on_every_module(tmp_path: Path, run: Dump) -> None:
    """Of several tensors that a module returns the first counts, of a layer's their sum; parameters, gradients and inputs are none."""
    dump = load(unpacked("sglang-modules", tmp_path))
    kinds = ("attn_norm", "attn_out", "ffn_norm", "ffn_out", "l_out")
    assert set(dump.points) == {"embd", *(f"blk.0.{kind}" for kind in kinds), "output_norm", "logits"}
    assert dump.points["logits"].token_idx.tolist() == [2]
    assert same(dump, run) == ("parity", 3 * 7 + 1)


@pytest.mark.parametrize(
    ("dims", "how"),
    [
        ("t (h*d)[tp]", "joined along axis 1"),
        ("t 1 h[tp]", "not the same on all"),
        ("t d[tp:zigzag+partial]", "summed"),
        ("t[cp:zigzag] d", "split along cp:zigzag"),
        ("t[sp] d[tp]", "split along tp"),
        ("t d # dp:=moe_dp tp:replicated", "not the same on all processes, although"),
    ],
)
def test_what_dims_say_is_done_or_refused(dims: str, how: str) -> None:
    """Axes that are not known are not guessed: joined along another one the tensor would be wrong."""
    parts = [np.zeros((3, 4), np.float32), np.ones((3, 4), np.float32)]
    whole, sentence = joined(parts, dims)
    assert sentence.startswith(how)
    assert (whole is None) == how.startswith(("split", "not"))


def test_tensorrt_llm_debug_hook(tmp_path: Path, run: Dump) -> None:
    """Modules by their place; what a module returned is told from its arguments; a residual handed on beside is added. A second forward
    pass goes on with the positions, not with the layers.
    """
    dump = load(unpacked("tensorrt-llm", tmp_path) / "data_dump")
    kinds = ("attn_norm", "kqv_out", "attn_out", "ffn_norm", "ffn_swiglu", "ffn_out", "l_out")
    assert set(dump.points) == {"embd", "blk.1.l_out", "output_norm", "logits", *(f"blk.0.{kind}" for kind in kinds)}
    assert dump.points["logits"].token_idx.tolist() == [1, 2]
    assert dump.header is not None
    assert dump.header.tokens == IDS
    assert same(dump, run) == ("parity", 3 * 10 + 2)


def test_edge_llm_rounds(tmp_path: Path, run: Dump) -> None:
    """Two rounds of two sequences: keys and values of the positions that each round made, logits at their ends, chosen tokens."""
    k, v = (run.points[f"blk.0.{kind}"].values.reshape(3, 1, -1).transpose(1, 0, 2) for kind in ("k_rope", "v"))
    cache = np.full((2, 2, 1, 8, k.shape[2]), 7, np.float16).astype(np.float32)
    cache[:, 0, :, :3], cache[:, 1, :, :3] = k, v
    logits = np.stack([run.points["logits"].values[1]] * 2), np.stack([run.points["logits"].values[2]] * 2)
    arrays: dict[str, Any] = {}
    for number in range(2):
        arrays[f"round_{number}.logits"] = logits[number]
        arrays[f"round_{number}.layer_0.kv"] = cache
        arrays[f"round_{number}.context_lengths"] = np.full(2, 2 + number, np.int32)
        arrays[f"round_{number}.generated_token_ids"] = np.full(2, 407 + number, np.int32)
    save_file(arrays, tmp_path / "edgellm_dump.safetensors")
    dump = load(tmp_path)
    assert [(token.token_idx, token.id, token.seq) for token in dump.tokens] == [
        (2, 407, 0),
        (2, 407, 1),
        (3, 408, 0),
        (3, 408, 1),
    ]
    assert {
        name: sorted(zip(rows.seq.tolist(), rows.token_idx.tolist(), strict=True)) for name, rows in dump.points.items()
    } == {
        "logits": [(0, 1), (0, 2), (1, 1), (1, 2)],
        **{f"blk.0.{kind}": [(seq, t) for seq in (0, 1) for t in range(3)] for kind in ("k_rope", "v")},
    }
    for name, rows in dump.points.items():
        for r, position in enumerate(rows.token_idx):
            assert np.array_equal(rows.values[r], run.points[name].values[position])


@pytest.mark.parametrize("pooled", [False, True])
def test_llama_debug_files(tmp_path: Path, run: Dump, pooled: bool) -> None:
    """Logits stand at the last token; embeddings are one row per token, or a single one of length 1 where they are pooled."""
    stem = tmp_path / "llamacpp-stories"
    np.array(IDS, np.int32).tofile(f"{stem}-tokens.bin")
    Path(f"{stem}-prompt.txt").write_text("prompt: Once\nupon\nn_tokens: 3\ntoken ids: 1, 403, 407\n")
    run.points["logits"].values[2].tofile(f"{stem}.bin")
    dump = load(f"{stem}.bin")
    assert dump.header is not None
    assert (dump.header.tokens, dump.header.prompt) == (IDS, "Once\nupon")
    assert same(dump, run) == ("parity", 1)
    assert dump.points["logits"].token_idx.tolist() == [2]
    rows = run.points["output_norm"].values
    (rows[0] / np.linalg.norm(rows[0]) if pooled else rows).astype(np.float32).tofile(f"{stem}-embeddings.bin")
    for name in ("-tokens.bin", "-prompt.txt"):
        Path(f"{stem}{name}").rename(f"{stem}-embeddings{name}")
    dump = load(f"{stem}-embeddings.bin")
    assert list(dump.points) == ["result_embd_pooled" if pooled else "output_norm"]
    if not pooled:
        assert same(dump, run) == ("parity", 3)
    with pytest.raises(DumpError, match="holds 2 files of values"):
        load(tmp_path)


def test_an_etdump_is_refused_in_one_line(tmp_path: Path) -> None:
    """ExecuTorch's file is known by its identifier, whatever its name; a shorter file is none."""
    file = tmp_path / "run.bin"
    file.write_bytes(b"\x18\0\0\0ED00" + bytes(64))
    with pytest.raises(DumpError, match="is ExecuTorch's ETDump"):
        load(file)
    file.write_bytes(b"ED00")
    with pytest.raises(DumpError, match="no checkpoint record"):
        load(file)


def test_vllm_s_hidden_states_are_named_by_a_mapping(run: Dump, tmp_path: Path) -> None:
    """Two layers of a request as vLLM writes them: not named without a mapping, which is said; then in parity, or wrong at their layer."""
    names = ("embd", "blk.0.l_out")
    states = np.stack([run.points[name].values for name in names], axis=1)
    ids = np.array([1, 403, 407, 261, 378][: len(states)], np.int64)
    save_file({"hidden_states": states, "token_ids": ids}, tmp_path / "request.safetensors")
    dump = load(tmp_path / "request.safetensors")
    assert list(dump.points) == ["hidden_states.0", "hidden_states.1"]
    assert dump.header is not None
    assert dump.header.tokens == tuple(ids)
    assert "name them with --map" in dump.notes[0]
    (tmp_path / "m.toml").write_text('[names]\n"hidden_states.0" = "embd"\n"hidden_states.1" = "blk.0.l_out"\n')
    mapped = load(tmp_path / "request.safetensors", read_mapping(tmp_path / "m.toml"))
    assert (list(mapped.points), mapped.notes) == (list(names), ())
    for name in names:
        np.testing.assert_array_equal(mapped.points[name].values, run.points[name].values)
    save_file({"hidden_states": states, "token_ids": ids[1:]}, tmp_path / "short.safetensors")
    with pytest.raises(DumpError, match="do not belong together"):
        load(tmp_path / "short.safetensors")


def test_shards_without_notes() -> None:
    """Copies are distinguished from parts, and positions from features; shards that do not fit are left out, with the reason."""
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    halves = [whole[:, :3], whole[:, 3:]]
    assert np.array_equal(joined(halves, count=4)[0], whole)
    assert np.array_equal(joined([whole[:2], whole[2:]], count=4)[0], whole)  # sequence parallel
    assert np.array_equal(joined([whole, whole.copy()])[0], whole)
    assert np.array_equal(joined([whole * 0.25, whole * 0.75], "t d[tp:partial]")[0], whole)
    heads = whole.reshape(4, 3, 2)
    assert np.array_equal(joined([heads[:, :1], heads[:, 1:]], "t h[tp] d")[0], heads)
    assert joined([whole, whole + 1], "t d # tp:replicated") == (
        None,
        "not the same on all processes, although noted as replicated",
    )
    assert joined([whole, whole[:3, :2]])[0] is None


class Called(Exception):
    """Raised if a pickle's code ran."""


def _raise() -> None:
    raise Called


class Evil:
    """Asks a pickle to call a function."""

    def __reduce__(self) -> Any:
        return _raise, ()


def torch_zip(description: bytes, **storages: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", description)
        for name, data in storages.items():
            archive.writestr(f"a/data/{name.removeprefix('s')}", data)
    return out.getvalue()


@pytest.mark.slow
def test_no_code_of_a_pickle_runs_and_no_small_file_fills_the_memory(tmp_path: Path) -> None:
    """What a pickle would call is not called; tensors larger than their storage, memory tricks and other files are refused."""
    file = tmp_path / "a.pt"
    file.write_bytes(torch_zip(pickle.dumps({"x": Evil()}, 2)))
    assert isinstance(contents(file)["x"], Opaque)
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    tensor = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    for description, message in (
        (tensor + b"K\x00J\x00\x00\x00\x40\x85K\x00\x85\x89NtR.", "larger than its storage"),
        (tensor + b"K\x02K\x03\x85K\x01\x85\x89NtR.", "larger than its storage"),
        (b"\x80\x02K\x01r\xff\xff\xff\x7f.", ""),  # a memo of two thousand million places
        (b"\x80\x02" + b"]" * (1 << 21), "too long"),
        (b"\x80\x02K\x01K\x02K\x03s.", "other than a dictionary"),
        (b"\x80\x02]", "pickle exhausted"),
        (b"\x80\x02}K\x01\x85K\x02s.", "is a tuple"),  # nested deep enough, hashing it takes for ever
        (b"\x80\x04K\x01K\x02\x93.", "other than text"),
    ):
        file.write_bytes(torch_zip(description, s0=np.arange(4, dtype=np.float32).tobytes()))
        if message:
            with pytest.raises(DumpError, match=message):
                contents(file)
        else:
            assert contents(file) == 1
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.writestr("a/data/0", bytes(1 << 26))
    for data, message in (
        (bomb.getvalue(), "would unpack"),
        (b"", "an empty file"),
        (b"\x80\x02N.", "old format"),
        (torch_zip(b""), "cannot read"),
    ):
        file.write_bytes(data)
        with pytest.raises(DumpError, match=message):
            contents(file)
