"""The emitted Python file stands alone, and writes what our own writer writes."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from checkpoints.jsonl import Writer
from checkpoints.reading.reader import read
from checkpoints.reading.words import KNOWN_ARITHMETIC, compute
from checkpoints.record import Header, ModelInfo
from checkpoints.summary import summarise
from parity.emit import source
from parity.lint.lint import lint


@pytest.mark.parametrize(("size", "places"), [(1, 1024), (256 << 10, 1024), (1_000_000, 256), (2 << 20, 128), (1 << 30, 8)])
def test_a_graph_s_ring_holds_a_busy_host_s_pause(emitted: ModuleType, size: int, places: int) -> None:
    """Replays of a decode step's default points, 1 MB, find 256 places: a thread may lose its core for 100 ms; others 8 to 1,024."""
    assert emitted.places_of(size) == places


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = tmp_path_factory.mktemp("emit") / "parity_dump.py"
    path.write_text(source("python"))
    spec = importlib.util.spec_from_file_location("parity_dump", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity_dump"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("language", ["python", "hf"])
def test_the_modules_of_a_file_share_no_name(language: str) -> None:
    """The modules that make up a file define no name twice: all would use the last definition."""
    tree = ast.parse(source(language))
    defined = Counter(node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))) + Counter(
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    )
    assert len(defined) > 50
    assert [name for name, count in defined.items() if count > 1] == []


def test_the_file_stands_alone(tmp_path: Path) -> None:
    """The file imports only NumPy and the standard library, and runs where none of our packages are installed."""
    tree = ast.parse(source("python"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"numpy"}
    (tmp_path / "parity_dump.py").write_text(source("python"))
    (tmp_path / "engine.py").write_text("ours = True\n")
    code = (
        "import sys, numpy, engine, parity_dump\n"
        "with parity_dump.Recorder('ours.jsonl', compute='f32', model='m', tokens=[1, 2]) as tap:\n"
        "    tap('embd', numpy.ones((2, 8), numpy.float32) * [[1], [2]])\n"
        "print(sorted({'checkpoints', 'orjson', 'parity', 'reference'} & set(sys.modules)), engine.ours)\n"
    )
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    done = subprocess.run([sys.executable, "-I", "-c", path + code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[] True"), done.stderr
    assert read(tmp_path / "ours.jsonl").records == 2


def test_it_writes_what_our_writer_writes(emitted: ModuleType, tmp_path: Path) -> None:
    """The same activations, non-finite ones too, read back the same from both files; lines are equal but for digits of float64."""
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((5, 64)).astype(np.float32)
    hidden[2, 3], hidden[2, 40] = np.nan, np.inf
    weights = rng.random((4, 5, 5)).astype(np.float32)
    with emitted.Recorder(
        tmp_path / "theirs.jsonl", compute="f32", model="m", tokens=[1, 2, 3, 4, 5], layers=24, source="x"
    ) as tap:
        tap("layer_5", hidden)
        tap("blk.5.kq_soft_max", weights)
        tap("layer_5", hidden[0])
        tap.token(6, 17, "ü")
    with Writer(tmp_path / "ours.jsonl", Header("x", ModelInfo("m", layers=24), (1, 2, 3, 4, 5), compute="f32")) as writer:
        writer.rows(summarise("blk.5.l_out", hidden, np.arange(5)))
        writer.rows(summarise("blk.5.kq_soft_max", weights, np.arange(5)))
        writer.rows(summarise("blk.5.l_out", hidden[:1], np.array([5]), step=1, decode=True))
    ours, theirs = read(tmp_path / "ours.jsonl"), read(tmp_path / "theirs.jsonl")
    assert ours.header == theirs.header
    assert theirs.notes == ()
    assert theirs.tokens[0].text == "ü"
    for name, rows in ours.points.items():
        other = theirs.points[name]
        assert np.array_equal(rows.values, other.values, equal_nan=True)
        assert np.array_equal(rows.sketch, other.sketch)  # type: ignore[arg-type]
        assert all(np.array_equal(column, other.stats[key], equal_nan=True) for key, column in rows.stats.items())
        assert (rows.shapes, rows.token_idx.tolist(), rows.decode.tolist()) == (
            other.shapes,
            other.token_idx.tolist(),
            other.decode.tolist(),
        )
    lines = [path.read_bytes().splitlines()[1] for path in (tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl")]
    assert lines[0] == lines[1]


class _Torch:
    """The part of PyTorch's tensors that the recorder uses: PyTorch itself is too large a dependency for a test."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def detach(self) -> "_Torch":
        return self

    float = cpu = detach

    def numpy(self) -> Any:
        return self.array


class _Dlpack:
    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: x.astype(np.float16),
        _Torch,
        _Dlpack,
        lambda x: SimpleNamespace(__cuda_array_interface__={}, get=lambda: x),
        lambda x: x.astype(np.float64),
    ],
)
def test_arrays_of_all_kinds_are_copied_at_once(emitted: ModuleType, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    """NumPy of any type, PyTorch's and CuPy's protocol and DLPack: what is recorded is what stood there at the call."""
    value = np.arange(12, dtype=np.float32).reshape(3, 4) ** 2
    with emitted.Recorder(tmp_path / "d.jsonl", compute="f32") as tap:
        tap("embd", wrap(value))
        value[:] = -1
    assert read(tmp_path / "d.jsonl").points["embd"].values[2].tolist() == [64, 81, 100, 121]
    with emitted.Recorder(tmp_path / "d.jsonl", compute="f32") as tap, pytest.raises(TypeError, match="made of an array"):
        tap("embd", "text")


def test_hooks_record_modules_by_name(emitted: ModuleType, tmp_path: Path) -> None:
    """`hook` takes the outputs of the submodules whose Hugging Face names are known, the first of a tuple; of two nested ones, once."""
    hooks: dict[str, Callable[..., None]] = {}

    def module(name: str) -> Any:
        def register(hook: Callable[..., None]) -> str:
            hooks[name] = hook
            return name

        return SimpleNamespace(register_forward_hook=register)

    attention = ("self_attn", "self_attn.q_proj", "self_attn.o_proj")
    inner = tuple(f"model.layers.3.{name}" for name in (*attention, "mlp", "mlp.down_proj"))
    names = ("model.embed_tokens", "model.layers.3", *inner, "model.rotary_emb", "lm_head")
    model = SimpleNamespace(named_modules=lambda: [(name, module(name)) for name in names])
    rng = np.random.default_rng(0)
    with emitted.Recorder(tmp_path / "d.jsonl", compute="f32", layers=24) as tap:
        assert len(tap.hook(model)) == 6
        for hook in hooks.values():
            hook(None, (), (rng.standard_normal((1, 3, 8)).astype(np.float32), None))
    dump = read(tmp_path / "d.jsonl")
    assert list(dump.points) == ["embd", "blk.3.l_out", "blk.3.attn_out", "blk.3.q", "blk.3.ffn_out", "logits"]
    assert {len(rows) for rows in dump.points.values()} == {3}
    assert lint(dump).findings == ()


def test_a_norm_of_heads_has_a_row_for_each_position(emitted: ModuleType, tmp_path: Path) -> None:
    """[B, T, heads, n], as Qwen3's and Gemma 3's q_norm gives it, is a row of heads × n for each position of each sequence."""
    value = np.arange(2 * 3 * 4 * 8, dtype=np.float32).reshape(2, 3, 4, 8)
    with emitted.Recorder(tmp_path / "d.jsonl", compute="f32", layers=24, hparams={"heads": 4}) as tap:
        tap("model.layers.3.self_attn.q_norm", value)
    rows = read(tmp_path / "d.jsonl").points["blk.3.q_norm"]
    assert (rows.seq.tolist(), rows.token_idx.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
    assert rows.shapes == ((32,),) * 6
    assert rows.values[4, :16].tolist() == value[1, 1].ravel()[:16].tolist()


class OnDevice(np.ndarray):  # type: ignore[type-arg]
    """An array with what the recorder asks PyTorch's of."""

    def contiguous(self) -> "OnDevice":
        return self

    def data_ptr(self) -> int:
        return self.ctypes.data


@pytest.mark.parametrize(
    ("point", "shape", "positions"),
    [
        ("blk.3.l_out", (3, 8), [7, 8, 9]),
        ("blk.3.l_out", (1, 3, 8), [7, 8, 9]),
        ("blk.3.q_norm", (1, 1, 4, 8), [7]),
        ("blk.3.q_norm", (1, 3, 4, 8), [7, 8, 9]),
        ("blk.3.kq", (4, 3, 8), [7, 8, 9]),
        ("blk.3.kq", (1, 4, 3, 8), [7, 8, 9]),
    ],
)
def test_a_replay_has_a_position_for_each_row(
    emitted: ModuleType, point: str, shape: tuple[int, ...], positions: list[int]
) -> None:
    """In a captured graph, too, a norm of heads has rows of positions, not of heads; scores have theirs behind the heads."""
    value, first = (array.view(OnDevice) for array in (np.zeros(shape, np.float32), np.array([7])))
    brought = np.frombuffer(value.tobytes() + first.tobytes(), np.uint8)
    slot = emitted.Slot(point, emitted.DeviceRow(value), None, 0)
    place = emitted.Slot("", emitted.DeviceRow(first), None, value.nbytes)
    assert emitted.Replayed(slot, place, brought).rows()[1] == positions


def test_prompts_of_unequal_length_are_told_apart(emitted: ModuleType, tmp_path: Path) -> None:
    """A batch that is packed, row by row, has its sequences' numbers, and positions number themselves in each."""
    with emitted.Recorder(tmp_path / "d.jsonl", compute="f32") as tap:
        for rows in (2, 1):
            tap("embd", np.ones((rows, 4)), seq=0)
            tap("embd", np.ones((rows + 1, 4)), seq=1)
    rows = read(tmp_path / "d.jsonl").points["embd"]
    places = sorted(zip(rows.seq.tolist(), rows.token_idx.tolist(), rows.step.tolist(), strict=True))
    assert places == [(0, 0, 0), (0, 1, 0), (0, 2, 1), (1, 0, 0), (1, 1, 0), (1, 2, 0), (1, 3, 1), (1, 4, 1)]


def test_rows_and_positions_are_as_many(emitted: ModuleType, tmp_path: Path) -> None:
    """Positions of which there are fewer or more than rows are refused, rather than taken for the first rows'; no rows are no error."""
    with emitted.Recorder(tmp_path / "d.jsonl", compute="f32", layers=24) as tap:
        for positions in ([0, 1], [0, 1, 2, 3]):
            with pytest.raises(ValueError, match=f"{len(positions)} positions for 3 rows"):
                tap("blk.3.q", np.zeros((1, 3, 8), np.float32), positions)
        tap("blk.3.q", np.zeros((1, 0, 8), np.float32))
        tap("blk.3.q", np.ones((1, 3, 8), np.float32), [5, 6, 7])
    assert read(tmp_path / "d.jsonl").points["blk.3.q"].token_idx.tolist() == [5, 6, 7]


def test_an_arithmetic_that_no_reader_knows_is_refused(emitted: ModuleType, tmp_path: Path) -> None:
    """It is an error of the first call, not of the comparison after the run; known ones are spelled as the format has them."""
    with pytest.raises(ValueError, match="'fp4', which is not known: write f64, f32"):
        emitted.Recorder(tmp_path / "refused.jsonl", compute="fp4")
    assert not (tmp_path / "refused.jsonl").exists()
    with emitted.Recorder(tmp_path / "d.jsonl", compute="torch.bfloat16") as tap:
        tap("embd", np.ones((1, 8), np.float32))
    header = read(tmp_path / "d.jsonl").header
    assert header is not None
    assert header.compute == "bf16"


def test_complex_numbers_are_refused(emitted: ModuleType, tmp_path: Path) -> None:
    """An array of complex numbers is an error of the call: its imaginary part is not dropped with a warning."""
    with emitted.Recorder(tmp_path / "d.jsonl", compute="f32") as tap, pytest.raises(TypeError, match="complex"):
        tap("blk.3.q", np.ones((2, 8), np.complex64))


@pytest.mark.parametrize(
    ("norms", "points"),
    [
        (("input_layernorm", "post_attention_layernorm"), ["blk.3.attn_norm", "blk.3.ffn_norm"]),
        (
            ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
            ["blk.3.attn_post_norm", "blk.3.ffn_norm", "blk.3.ffn_post_norm"],
        ),
    ],
)
def test_a_norm_has_its_name_from_those_beside_it(
    emitted: ModuleType, tmp_path: Path, norms: tuple[str, ...], points: list[str]
) -> None:
    """`post_attention_layernorm` comes before Llama's feed-forward, but after the attention of Gemma 2, 3 and OLMo 2."""
    hooks: list[Callable[..., None]] = []
    part = SimpleNamespace(register_forward_hook=hooks.append)
    model = SimpleNamespace(named_modules=lambda: [(f"model.layers.3.{name}", part) for name in norms])
    with emitted.Recorder(tmp_path / "d.jsonl", compute="f32", layers=24) as tap:
        tap.hook(model)
        for number, hook in enumerate(hooks):
            hook(None, (), np.full((1, 2, 8), number, dtype=np.float32))
    dump = read(tmp_path / "d.jsonl")
    assert sorted(dump.points, key=points.index) == points
    assert [float(dump.points[name].values[0, 0]) for name in points] == list(range(len(points)))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("c", r"\*const known\[\] = \{(.*?)\};"), ("rust", r"ARITHMETIC: .*?= \[(.*?)\];.*?= *\n? *\[(.*?)\];")],
)
def test_recorders_take_the_words_that_readers_know(name: str, pattern: str) -> None:
    """The lists in C and Rust are the reader's: a word that one of them lacks would be refused, or found out after the run."""
    found = re.search(pattern, source(name), re.DOTALL)
    assert found is not None
    words = set(re.findall(r'"(\w+)"', " ".join(found.groups())))
    assert all(compute(word) for word in words)
    assert words == set(KNOWN_ARITHMETIC)
