"""`parity_inject`: layers judged one by one, each given the reference's input, in engines in C and in Python."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cli import Cli, refused

from checkpoints.answers.bisect import NOT_JUDGED, RIGHT, WRONG, Bisected, JudgedPart
from parity import emit
from parity.hunt.bisect import write_values
from reports.bisect import sentence

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")

# An engine in NumPy that records and injects by the emitted file; FAULTS are layers whose norm has another ε.
ENGINE = """
import sys
import numpy as np
from foreign_engine import Engine, Model, rotated
from parity_dump import Recorder

path, tokens, out, points, faults = sys.argv[1:6]
ids = [int(number) for number in tokens.split(",")]
m = Model(path)
right, wrong = m.eps, {int(layer) for layer in faults.split(",") if layer}
helper, none = Engine(m, None, set(), ""), np.zeros(1, dtype=int)
columns = np.arange(len(ids))
with Recorder(out, compute="f32", model=path, tokens=ids, layers=m.layers, points=points) as tap:
    x = m.weights["token_embd.weight"].astype(np.float32)[ids]
    tap("embd", x)
    x = tap.inject("embd", x)
    for layer in range(m.layers):
        at = f"blk.{layer}"
        m.eps = 1e-2 if layer in wrong else right
        n = m.norm(f"{at}.attn_norm", x)
        tap(f"{at}.attn_norm", n)
        q, k, v = (m.product(f"{at}.attn_{which}", n)[None] for which in "qkv")
        q = rotated(q.reshape(1, len(ids), m.heads, m.size), columns[None], m.base, neighbours=m.kind == "llama")
        k = rotated(k.reshape(1, len(ids), m.kv_heads, m.size), columns[None], m.base, neighbours=m.kind == "llama")
        attended = helper.attention(q, k, v.reshape(k.shape), columns, none).reshape(len(ids), -1)
        x = x + m.product(f"{at}.attn_output", attended)
        n = m.norm(f"{at}.ffn_norm", x)
        gate = m.product(f"{at}.ffn_gate", n)
        x = x + m.product(f"{at}.ffn_down", gate / (1 + np.exp(-gate)) * m.product(f"{at}.ffn_up", n))
        if "after" in sys.argv:  # recorded after the injection: what is judged is never what was injected
            x = tap.inject(f"{at}.l_out", x)
        tap(f"{at}.l_out", x)
        if "after" not in sys.argv:
            x = tap.inject(f"{at}.l_out", x)
    m.eps = right
    x = m.norm("output_norm", x)
    tap("output_norm", x)
    tap("logits", m.product("output", x))
"""


@pytest.fixture
def python_engine(tmp_path: Path) -> Callable[..., str]:
    """A function that gives the command line of the engine in NumPy, with faulty layers."""
    (tmp_path / "parity_dump.py").write_text(emit.source("python"), encoding="utf-8")
    script = tmp_path / "engine.py"
    script.write_text(ENGINE, encoding="utf-8")

    def line(faults: str, *more: str) -> str:
        path = f"PYTHONPATH={Path(__file__).parent}:{tmp_path}"
        return " ".join([path, sys.executable, str(script), "{model} {tokens} {out} {points}", f"'{faults}'", *more])

    return line


def judged(parity: Cli, model: Path, line: str, *more: str) -> tuple[int, dict[str, Any]]:
    """The answer of --bisect on a prompt of five tokens."""
    return parity.json("run", "--model", model, "--tokens", "5,17,3,40,9", "--exec", line, "--bisect", "--out", "folder", *more)


@needs_gcc
@pytest.mark.parametrize("faults", ["", "0", "1,2,4"])
def test_wrong_layers_of_an_engine_in_c_are_named(
    faults: str, c_engine: Path, synthetic: Callable[..., Path], parity: Cli
) -> None:
    """One wrong layer, several, neighbours: each is named, no other is, in two runs of the engine."""
    model = synthetic("tiny", layers=5)
    code, answer = judged(parity, model, f"{c_engine} {{model}} {{tokens}} {{out}} layers:{faults or 99} {{points}}")
    assert answer["wrong"] == [f"blk.{layer}" for layer in faults.split(",") if layer]
    assert (code, answer["runs"], len(answer["parts"])) == (int(bool(faults)), 2, 7)
    assert all(part["status"] != "not judged" for part in answer["parts"])


@needs_gcc
def test_with_all_points_the_operation_is_named(c_engine: Path, synthetic: Callable[..., Path], parity: Cli) -> None:
    """In each wrong layer the first point that differs from a right input on: here the rotated queries."""
    line = f"{c_engine} {{model}} {{tokens}} {{out}} layers:1,3 {{points}}"
    code, answer = judged(parity, synthetic("tiny", layers=5), line, "--points", "all")
    assert (code, [part["point"] for part in answer["parts"] if part["point"]]) == (1, ["blk.1.q_rope", "blk.3.q_rope"])


@pytest.mark.slow
@pytest.mark.parametrize(("faults", "order"), [("", ()), ("2", ()), ("0,3", ()), ("2", ("after",)), ("1,2", ("after",))])
def test_wrong_layers_of_an_engine_in_python_are_named(
    faults: str, order: tuple[str, ...], python_engine: Callable[..., str], synthetic: Callable[..., Path], parity: Cli
) -> None:
    """The same by the emitted Python file, whether it records before it injects or after."""
    code, answer = judged(parity, synthetic("tiny", layers=4), python_engine(faults, *order))
    assert (code, answer["wrong"]) == (int(bool(faults)), [f"blk.{layer}" for layer in faults.split(",") if layer])


@needs_gcc
def test_an_engine_that_injects_nothing_is_told_so(c_engine: Path, synthetic: Callable[..., Path], parity: Cli) -> None:
    """It prints the same whatever it is given: that is said, and no layer is accused."""
    line = f"{c_engine} {{model}} {{tokens}} {{out}} deaf-layers:1 {{points}}"
    run = ("run", "--model", synthetic("tiny", layers=5), "--tokens", "5,17,3", "--exec", line, "--out", "folder")
    refused(parity(*run, "--bisect"), "does not inject anything", "parity emit c")


def test_what_it_refuses(parity: Cli) -> None:
    """Without an engine, with another side, or with tokens to generate there is nothing to bisect."""
    refused(parity("run", "--prompt", "hi", "--bisect"), "--bisect needs an engine")
    line = ("--exec", "x {out}")
    refused(parity("run", "--prompt", "hi", *line, "--bisect", "--hunt"), "--bisect needs an engine")
    refused(parity("run", "--prompt", "hi", *line, "--bisect", "--first-position", "5"), "--first-position")
    refused(parity("run", "--prompt", "hi", *line, "--bisect", "--generate", "2"), "cannot be combined with --generate")


@pytest.fixture
def emitted(tmp_path: Path) -> ModuleType:
    """The emitted Python file, imported."""
    path = tmp_path / "parity_dump.py"
    path.write_text(emit.source("python"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("parity_dump_injecting", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rows_are_replaced_by_position(emitted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rows that the file has, in the array's own type; passes number themselves; other points come back as they are."""
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    write_values(tmp_path / "values", {"blk.0.l_out": rows})
    monkeypatch.setenv("PARITY_INJECT", str(tmp_path / "values"))
    with emitted.Recorder(tmp_path / "x.jsonl", compute="f32", layers=2) as tap:
        first = tap.inject("blk.0.l_out", np.zeros((1, 1, 4), dtype=np.float16))
        then = tap.inject("blk.0.l_out", np.full((2, 4), 7.0))
        same = np.ones(4)
        assert tap.inject("blk.1.l_out", same) is same
        with pytest.raises(ValueError, match="values per row"):
            tap.inject("blk.0.l_out", np.zeros((1, 5)))

        class Module:
            hook: Callable[..., Any]

            def named_modules(self) -> list[tuple[str, Any]]:
                return [("model.layers.0", self)]

            def register_forward_hook(self, hook: Callable[..., Any]) -> None:
                self.hook = hook

        module = Module()
        tap._injected.clear()
        tap.hook(module)
        output = module.hook(module, (), (np.zeros((2, 4), dtype=np.float32), "cache"))
    assert (first.dtype, first.shape) == (np.float16, (1, 1, 4))
    np.testing.assert_array_equal(first[0, 0], rows[0])
    np.testing.assert_array_equal(then, np.stack([rows[1], np.full(4, 7.0)]))
    np.testing.assert_array_equal(output[0], rows)
    assert output[1] == "cache"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"something",
        b"PARITY-INJECT 1\nembd 0 x 4\n",
        b"PARITY-INJECT 1\nembd 0 2 4\nshort",
        b"PARITY-INJECT 1\nembd 0 99999999 99999999\n",
        b"PARITY-INJECT 1\n" + b"a" * 4000,
    ],
)
def test_a_damaged_file_is_refused(data: bytes, emitted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither emitter goes on with a file that is no such file."""
    (tmp_path / "values").write_bytes(data)
    monkeypatch.setenv("PARITY_INJECT", str(tmp_path / "values"))
    with pytest.raises(ValueError, match=r"not a file|damaged|cut short"):
        emitted.Recorder(tmp_path / "x.jsonl", compute="f32")


PROGRAM = r"""
#include "parity_dump.h"
int main(int argc, char **argv) {
    parity_dump *d = parity_open(argv[1]);
    float row[300];
    uint16_t half[300], brain[300];
    int n = argc > 2 ? atoi(argv[2]) : 300, got;
    got = parity_inject(d, "blk.0.l_out", 1, row, PARITY_F32, (size_t)n);
    if (got != 1 || parity_inject(d, "blk.0.l_out", 1, half, PARITY_F16, 300) != 1 ||
        parity_inject(d, "blk.0.l_out", 1, brain, PARITY_BF16, 300) != 1 || parity_inject(d, "blk.0.l_out", 2, row, PARITY_F32, 300) != 0 ||
        parity_inject(d, "blk.1.l_out", 0, row, PARITY_F32, 300) != 0) {
        puts(parity_error(d));
        parity_close(d);
        return 1;
    }
    fwrite(row, 4, 300, stdout);
    fwrite(half, 2, 300, stdout);
    fwrite(brain, 2, 300, stdout);
    return parity_close(d);
}
"""


@needs_gcc
def test_the_header_rounds_as_numpy_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 to F16 and BF16 to nearest, ties to even: normal, subnormal, huge, infinite and NaN; damaged files are an error."""
    (tmp_path / "parity_dump.h").write_text(emit.source("c"))
    (tmp_path / "main.c").write_text(PROGRAM)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsanitize=address,undefined"]
    subprocess.run(["gcc", *flags, "main.c", "-o", "program", "-lm", "-lpthread"], cwd=tmp_path, check=True)
    random = np.random.default_rng(1)
    with np.errstate(invalid="ignore"):  # some are signalling NaNs
        halves = random.integers(0, 1 << 16, 90).astype(np.uint16).view(np.float16).astype(np.float32)
    ties = (np.nextafter(np.float16(1), np.float16(2)).astype(np.float32) + 1) / 2
    special = np.array(
        [0, -0.0, 65504, 65519.99, 65520, 1e9, -1e9, np.inf, -np.inf, np.nan, 6e-8, 2.98e-8, 2.99e-8, 1e-40, ties, 3 * ties]
    )
    scale = np.exp(random.uniform(-20, 12, 300 - 90 - len(special)))
    with np.errstate(invalid="ignore"):
        row = np.concatenate([halves, special, random.normal(size=len(scale)) * scale]).astype(np.float32)
    write_values(
        tmp_path / "values", {"embd": np.zeros((3, 7), np.float32), "blk.0.l_out": np.stack([np.zeros_like(row), row])}
    )
    monkeypatch.setenv("PARITY_INJECT", str(tmp_path / "values"))
    out = subprocess.run([tmp_path / "program", tmp_path / "x.jsonl"], check=True, capture_output=True).stdout
    np.testing.assert_array_equal(np.frombuffer(out[:1200], "<f4"), row)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(np.frombuffer(out[1200:1800], "<f2"), row.astype(np.float16))
    bits = row.view(np.uint32).astype(np.uint64)
    brain = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    finite = ~np.isnan(row)
    np.testing.assert_array_equal(np.frombuffer(out[1800:], "<u2")[finite], brain[finite])
    wrong = subprocess.run([tmp_path / "program", tmp_path / "x.jsonl", "299"], check=False, capture_output=True, text=True)
    assert "another number of values" in wrong.stdout
    whole = (tmp_path / "values").read_bytes()
    for data in (b"", b"no such file", whole[:-1200], whole[:20] + b"junk\n" + whole[20:]):
        (tmp_path / "values").write_bytes(data)
        ran = subprocess.run([tmp_path / "program", tmp_path / "x.jsonl"], check=False, capture_output=True, text=True)
        assert ran.returncode == 1, data[:40]
        assert ran.stdout.strip()


@pytest.mark.parametrize(
    ("wrong", "not_judged", "answer"),
    [
        ("embd blk.1 blk.2 output", "", "embd, layers 1–2 and output are wrong given llama.cpp's inputs; no part is right"),
        ("embd blk.1 blk.2", "", "embd and layers 1–2 are wrong given llama.cpp's inputs; one other part is right"),
        ("embd blk.2", "blk.1 output", "embd and layer 2 are wrong given llama.cpp's inputs; no other part was judged"),
        ("blk.2", "", "layer 2 is wrong given llama.cpp's inputs; the other 3 of 4 parts are right"),
    ],
)
def test_wrong_parts_are_listed_in_the_order_of_computation(wrong: str, not_judged: str, answer: str) -> None:
    """The sentence names the embedding first and what follows the layers last, and is right for one part as for several."""
    parts = tuple(
        JudgedPart(name, WRONG if name in wrong.split() else NOT_JUDGED if name in not_judged.split() else RIGHT, "embd")
        for name in ("embd", "blk.1", "blk.2", "output")
    )
    assert sentence(Bisected(parts, 2, "e", 1.0, "runs")) == answer
