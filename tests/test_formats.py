"""Files of llama.cpp, Hugging Face and NumPy are read as dumps, and compared."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli import Cli
from msgspec.structs import replace
from numpy.typing import NDArray
from safetensors.numpy import save_file

from checkpoints.errors import ParityError
from checkpoints.formats import load
from checkpoints.tensors import TensorReader
from engine.backend import choose
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.diff.compare import Options, compare
from parity.lint.lint import lint
from parity.run.ours import OursJob, dump

TOKENS = tuple(range(300, 309))


@pytest.fixture(scope="module")
def run(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our engine's dump with whole tensors beside it."""
    out = tmp_path_factory.mktemp("run") / "ours.jsonl"
    dump(Transformer(GgufModel(stories), choose("numpy")), OursJob(out, TOKENS, points="all", full=True))
    return out


def whole(run: Path, point: str) -> NDArray[np.float32]:
    return TensorReader(run.with_suffix(".safetensors")).get(point)


NODES = {
    "embd": ("inp_embd", "GET_ROWS", "token_embd.weight"),
    "blk.5.q": ("Qcur-5", "ADD", "Qcur-5"),
    "blk.5.q_rope": ("Qcur-5", "ROPE", "Qcur-5 (reshaped)"),
    "blk.5.attn_out": ("node_77", "MUL_MAT", "blk.5.attn_output.weight"),
    "blk.5.l_out": ("l_out-5", "ADD", "ffn_out-5"),
    "output_norm": ("result_norm", "MUL", "norm"),
    "logits": ("result_output", "MUL_MAT", "token_embd.weight"),
}


def printed(run: Path, style: str) -> Iterator[str]:
    """The lines that llama.cpp prints in each of its three styles."""
    yield "llama_model_loader: loaded meta data with 29 key-value pairs"
    for point, (name, op, source) in NODES.items():
        array = whole(run, point)[:, None, :]
        if point.endswith("rope"):
            array = array.reshape(len(array), 4, -1)  # the embedded model's heads
        blocks = array if point.endswith("rope") else array.transpose(1, 0, 2)
        deep, across, width = blocks.shape
        label = "common_debug_cb_eval" if style == "new" else "ggml_debug"
        yield f"{label}: {name:>24} = (f32) {op:>10}({source}{{1, 1, 1, 1}}, x{{1, 1, 1, 1}}}}) = {{{width}, {across}, {deep}, 1}}"
        pad = "    " if style == "new" else " "
        base = "" if style == "new" else " " * 37
        yield f"{base}{pad}["
        for i2 in _shown(deep):
            if i2 is None:
                yield f"{base}{pad * 2}..., "
                continue
            yield f"{base}{pad * 2}["
            for i1 in _shown(across):
                if i1 is None:
                    yield f"{base}{pad * 3}..., "
                    continue
                row = blocks[i2, i1]
                ends = "" if style == "old" else ", " + ", ".join(f"{x:12.4f}" for x in row[-3:])
                yield f"{base}{pad * 3}[" + ", ".join(f"{x:12.4f}" for x in row[:3]) + f",    ...{ends} ],"
            if i2 == 0 and style == "new":
                yield "srv  update: a line of another thread"
            yield f"{base}{pad * 2}],"
        yield f"{base}{pad}]"
        if style != "old":
            yield f"{base}{pad}sum = {float(blocks.sum()):f}"


def _shown(count: int) -> list[int | None]:
    return [*range(count)] if count <= 6 else [0, 1, 2, None, count - 3, count - 2, count - 1]


@pytest.mark.parametrize("style", ["old", "middle", "new"])
def test_eval_callback_logs_are_compared_to_the_printed_precision(run: Path, style: str, tmp_path: Path) -> None:
    """All three styles: each printed value stands at its element and position, and agrees to half of the last decimal."""
    log = tmp_path / "debug.log"
    log.write_text("\n".join(printed(run, style)))
    logged, ours = load(log), load(run)
    assert set(logged.points) == set(NODES)
    assert lint(logged).findings == ()
    for point, rows in logged.points.items():
        array = whole(run, point)
        shown = [0, 1, 2, 6, 7, 8] if len(array) > 6 else range(len(array))
        assert rows.token_idx.tolist() == list(shown)
        for r, position in enumerate(rows.token_idx):
            at = rows.indices[r, : rows.counts[r]]  # type: ignore[index]
            assert np.abs(array[position, at] - rows.values[r, : rows.counts[r]]).max() <= 0.50001e-4
    spoiled = {
        name: replace(rows, values=rows.values + np.float32(0.01 * (name == "blk.5.l_out")))
        for name, rows in logged.points.items()
    }
    assert compare(logged, ours).verdict == "parity"
    worse = compare(replace(logged, points=spoiled), ours, Options(strict=True))  # by itself: what follows agrees
    assert worse.first_divergence is not None
    assert worse.first_divergence.checkpoint == "blk.5.l_out"


LOGS = Path(__file__).parent / "logs"


@pytest.mark.parametrize("style", ["middle", "new"])
def test_real_eval_callback_logs_agree_exactly(run: Path, style: str) -> None:
    """What llama.cpp printed of the F32 twin is what our engine computes, attention and both passes too, and lint is silent."""
    dump = load(LOGS / f"eval-callback-{style}.log")
    verdict = compare(dump, load(run), Options(compute="f32"))
    assert (verdict.verdict, verdict.compared) == ("parity", 123)
    assert {"blk.0.kq", "blk.0.kq_soft_max", "blk.0.k_rope", "output_norm", "logits"} < set(dump.points)
    assert set(dump.points["embd"].step) == {0, 1}
    assert dump.points["blk.0.kq"].shapes[-1] == (8, 9)
    assert lint(dump).findings == ()
    assert ("pass_sum" in dump.points["embd"].stats) == (style == "new")


def test_a_sum_beside_its_sum_of_squares_is_read(tmp_path: Path) -> None:
    """`llama-debug` of December 2025 printed "sum    =" and "sum_sq =": the sums are those of the real log, and nothing else changes."""
    log = LOGS / "eval-callback-new.log"
    both = tmp_path / "both.log"
    both.write_text(re.sub(r"( *)sum = (.*)", r"\1sum    = \2\n\1sum_sq = 4.5", log.read_text()))
    once, squared = load(log), load(both)
    assert once.points.keys() == squared.points.keys()
    for name, rows in once.points.items():
        for statistic, values in rows.stats.items():
            np.testing.assert_array_equal(values, squared.points[name].stats[statistic])


def test_a_printed_sum_of_all_values_shows_what_the_printed_ones_hide(run: Path) -> None:
    """An error in rows and elements that no log prints is a divergence at the last position of its pass; a right sum is none."""
    ours, printed = load(run), load(LOGS / "eval-callback-new.log")
    rows = printed.points["blk.0.ffn_up"]
    printed = replace(printed, points={"embd": printed.points["embd"]})  # nothing that is made from it acquits the operation
    for last, off, place in ((7, 1.0, ("blk.0.ffn_up", 7)), (8, 1.0, ("blk.0.ffn_up", 8)), (7, 1e-5, None)):
        sums = rows.stats["pass_sum"] + np.where(rows.token_idx == last, np.float64(off), 0)
        spoiled = {**printed.points, "blk.0.ffn_up": replace(rows, stats={**rows.stats, "pass_sum": sums})}
        first = compare(replace(printed, points=spoiled), ours, Options(compute="f32")).first_divergence
        assert (None if first is None else (first.checkpoint, first.token_idx)) == place


def test_noise_that_turns_a_printed_digit_over_is_noise(tmp_path: Path) -> None:
    """Where a right engine's rounding noise decides what the fourth decimal is, exact mode still sees parity; errors it sees."""
    rng = np.random.default_rng(0)
    right = rng.standard_normal((2000, 16)).astype(np.float32)
    noisy = (right * (1 + 1e-7 * rng.standard_normal(right.shape))).astype(np.float32)
    for wrong, verdict in ((0.0, "parity"), (0.01, "divergence")):
        lines = [
            json.dumps({"checkpoint": "blk.0.q", "token_idx": t, "values": "@"}).replace(
                '"@"', "[" + ",".join(f"{x + wrong * (i == 7):.4f}" for i, x in enumerate(row)) + "]"
            )
            for t, row in enumerate(noisy)
        ]
        (tmp_path / "printed.jsonl").write_text("\n".join(lines))
        np.savez(tmp_path / "right.npz", **{"blk.0.q": right})  # type: ignore[arg-type]
        answer = compare(
            load(tmp_path / "printed.jsonl"), load(tmp_path / "right.npz"), Options(compute="f32", tolerance=1e-10)
        )
        assert answer.verdict == verdict


@pytest.mark.parametrize("kind", ["npz", "npy", "safetensors", "folder"])
def test_arrays_named_by_point_agree(run: Path, kind: str, tmp_path: Path) -> None:
    """.npz, folders of .npy, .safetensors: whole arrays, with a leading 1 or without, are parity."""
    arrays = {name: whole(run, name) for name in ("embd", "blk.3.l_out", "blk.3.kq_soft_max", "logits")}
    path = tmp_path / f"dump.{kind}"
    if kind == "npz":
        np.savez(path, **{name: array[None] for name, array in arrays.items()})
    elif kind == "safetensors":
        save_file(arrays, path)
    elif kind == "npy":
        path = tmp_path / "blk.3.l_out.npy"
        np.save(path, arrays["blk.3.l_out"])
    else:
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    dump = load(path)
    assert lint(dump).findings == ()
    verdict = compare(dump, load(run))
    assert verdict.verdict == "parity"
    assert verdict.compared == len(TOKENS) * len(dump.points)


@pytest.mark.parametrize("number", ["²", "9" * 30, "9" * 5000], ids=["superscript", "long", "longer"])
def test_a_name_that_ends_in_what_is_no_pass_is_a_name(number: str, tmp_path: Path) -> None:
    """Behind the slash of an array's name may stand anything: only a number that a pass can have is one."""
    path = tmp_path / "dump.npz"
    np.savez(path, **{"embd": np.zeros((2, 8), np.float32), f"embd/{number}": np.ones((2, 8), np.float32)})
    assert set(load(path).points) == {"embd", f"embd/{number}"}


def test_hugging_faces_debugger_tree_is_read(run: Path, tmp_path: Path) -> None:
    """Outputs of known modules and the residual stream from the norms' inputs; a tree of printed tensors says what to do."""

    def tensor(name: str, array: NDArray[np.float32]) -> dict[str, str]:
        save_file({"data": array[None]}, tmp_path / f"{name}.safetensors")
        return {"shape": "", "dtype": "torch.float32", "value": f"./{name}.safetensors"}

    base = "Qwen2ForCausalLM.model.layers.1"
    layer = {
        "module_path": base,
        "outputs": None,
        "children": [
            {
                "module_path": f"{base}.input_layernorm",
                "inputs": {"args": [tensor("a", whole(run, "blk.0.l_out"))]},
                "outputs": tensor("b", whole(run, "blk.1.attn_norm")),
            },
            {"module_path": f"{base}.self_attn.q_proj", "outputs": tensor("c", whole(run, "blk.1.q"))},
        ],
    }
    tree = tmp_path / "Qwen2ForCausalLM_debug_tree_FULL_TENSORS.json"
    tree.write_text(json.dumps({"module_path": "Qwen2ForCausalLM", "children": [layer]}))
    dump = load(tmp_path)
    assert set(dump.points) == {"blk.0.l_out", "blk.1.attn_norm", "blk.1.q"}
    assert compare(dump, load(run)).verdict == "parity"
    for value in (["tensor"], ["tensor([1., 2.])"]):
        lm_head = {"module_path": "X.lm_head", "outputs": {"value": value, "shape": "torch.Size([1, 9, 64])"}}
        tree.write_text(json.dumps({"module_path": "X", "children": [lm_head]}))
        with pytest.raises(ParityError, match="cannot read logits"):
            load(tree)


def test_a_real_debugger_tree_says_the_same_printed_and_as_arrays(tmp_path: Path) -> None:
    """What Transformers prints of a small Qwen2, long tensors in part, is what its safetensors hold, to half a printed digit."""
    for kind in ("printed", "arrays"):
        with zipfile.ZipFile(LOGS / f"model-debugger-{kind}.zip") as archive:
            archive.extractall(tmp_path / kind)
    printed, arrays = load(tmp_path / "printed"), load(tmp_path / "arrays")
    assert (
        set(printed.points) == set(arrays.points) > {"embd", "blk.0.l_out", "blk.1.l_out", "blk.1.k", "output_norm", "logits"}
    )
    assert printed.points["logits"].token_idx.tolist() == [0, 1, 2, 6, 7, 8]
    assert lint(printed).findings == lint(arrays).findings == ()
    assert compare(printed, arrays).worst.nmse == 0  # type: ignore[union-attr]
    for rows in printed.points.values():
        assert rows.quantum is not None
        at = np.arange(rows.values.shape[1])[None] if rows.indices is None else rows.indices
        whole = np.take_along_axis(arrays.points[rows.point].values[rows.token_idx], np.broadcast_to(at, rows.values.shape), 1)
        assert (np.abs(whole - rows.values) <= rows.quantum / 2 + np.spacing(np.abs(whole))).all()
    (summary,) = (tmp_path / "printed").glob("*_SUMMARY.json")
    with pytest.raises(ParityError, match="FULL_TENSORS"):
        load(summary)


@pytest.mark.slow
def test_convert_writes_any_of_them_as_format_1(run: Path, parity: Cli, tmp_path: Path) -> None:
    """A converted log and converted arrays compare as their sources do; offsets shift positions and are said."""
    (tmp_path / "debug.log").write_text("\n".join(printed(run, "new")))
    assert parity("convert", "debug.log", "-o", "log.jsonl").code == 0
    assert parity("lint", "log.jsonl").code == 0
    assert parity.json("diff", "log.jsonl", run)[1]["verdict"] == "parity"
    (tmp_path / "real.log").write_bytes((LOGS / "eval-callback-new.log").read_bytes())
    assert parity("convert", "real.log", "-o", "real.jsonl").code == 0
    code, answer = parity.json("diff", "real.jsonl", run, "--compute", "f32")  # what was printed to four decimals stays so
    assert (code, answer["compared"]) == (0, 123)
    assert parity("convert", "debug.log", "-o", "late.jsonl", "--offset", "5").code == 0
    assert int(load("late.jsonl").points["embd"].token_idx.min()) == 5
    code, answer = parity.json("diff", "late.jsonl", run, "--offset", "-5")
    assert (code, answer["verdict"]) == (0, "parity")
    assert any("shifted by -5" in note for note in answer["notes"])
    assert parity("convert", "debug.log", "-o", "x.jsonl", "--offset", "-1").code == 2
    assert parity("convert", "none.log", "-o", "x.jsonl").code == 2
