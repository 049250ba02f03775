"""parity_dump.h compiles everywhere, writes what the Python writer writes, and a foreign engine's mistakes are named."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cli import Cli

from checkpoints.reading.reader import read
from checkpoints.summary import summarise
from parity import emit
from parity.emit.graphs import places_of
from parity.lint.lint import lint
from reference.client import DumpJob, Reference

TOKENS = (2047, 430, 457, 258, 403, 402)
GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(GCC is None, reason="there is no gcc")
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic")
# Rows of 40 values from a formula, as float32, float16 and bfloat16, with a NaN and an infinity; some from four threads.
PROGRAM = r"""
#include "parity_dump.h"
static parity_dump *d;
static void *many(void *number) {
    float x[40];
    int i, t;
    for (t = 0; t < 50; t++) {
        for (i = 0; i < 40; i++) x[i] = (float)(i * 7 % 11) - 3.3f * (float)t;
        parity_checkpoint(d, (const char *)number, t, x, PARITY_F32, 40);
    }
    return NULL;
}
int main(int argc, char **argv) {
    static char names[4][16] = {"blk.0.l_out", "blk.1.l_out", "blk.2.l_out", "blk.3.l_out"};
    float x[40];
    uint16_t half[40];
    int i, tokens[] = {5, 6, 7};
    pthread_t threads[4];
    if (argc < 2 || !(d = parity_open(argv[1]))) return 1;
    parity_header(d, "a \"quoted\" engine", "a model\n", 24, tokens, 3, "f32");
    for (i = 0; i < 40; i++) x[i] = (float)(i * i % 17) / 7.0f - 1.0f;
    parity_checkpoint(d, "embd", 0, x, PARITY_F32, 40);
    x[3] = NAN, x[30] = -INFINITY;
    parity_pass(d, 1, 1);
    parity_sequence(d, 2);
    parity_checkpoint(d, "embd", 1, x, PARITY_F32, 40);
    parity_sequence(d, 0);
    for (i = 0; i < 40; i++) half[i] = (uint16_t)(i * 1543);
    parity_checkpoint(d, "blk.5.q", 0, half, PARITY_F16, 40);
    for (i = 0; i < 40; i++) half[i] = (uint16_t)(0x3F00 + i * 13);
    parity_checkpoint(d, "blk.5.k", 0, half, PARITY_BF16, 40);
    for (i = 0; i < 4; i++) pthread_create(&threads[i], NULL, many, names[i]);
    for (i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    parity_token(d, 3, 9, "\t\"x\"");
    if (parity_checkpoint(d, "embd", -1, x, PARITY_F32, 40) == 0 || !parity_error(d)[0]) return 2;
    d->error[0] = 0;
    return parity_close(d) ? 3 : 0;
}
"""


@dataclass(frozen=True)
class Compiled:
    """An engine that was compiled, and the model it reads."""

    program: Path
    model: Path

    def run(self, out: Path, fault: str = "") -> None:
        subprocess.run([self.program, self.model, ",".join(map(str, TOKENS)), out, fault], check=True)


def compiled(source: Path, out: Path, *flags: str, compiler: str = "gcc") -> Path:
    (out.parent / "parity_dump.h").write_text(emit.source("c"))
    command = [compiler, *flags, *STRICT, "-I", str(out.parent), str(source), "-o", str(out), "-lm", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def engine(stories: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The foreign engine in C, linked with the header."""
    folder = tmp_path_factory.mktemp("engine")
    program = compiled(Path(__file__).with_name("foreign_engine.c"), folder / "engine", "-std=c99", "-O2")
    return Compiled(program, Path(reference.twin(stories)))


RING = """
#include <stdio.h>
#include <stdlib.h>
#include "parity_dump.h"
int main(int argc, char **argv) {
    while (argc > 2) printf("%u\\n", parity__places(strtoull(argv[argc - 2], NULL, 10), (uint32_t)atoi(argv[argc - 1]))), argc -= 2;
    return 0;
}
"""


@needs_gcc
@pytest.mark.parametrize("compiler", ["gcc", "g++"])
def test_a_ring_has_the_places_that_the_python_recorder_s_has(compiler: str, tmp_path: Path) -> None:
    """1,024 replays in 256 MiB, shared by the graphs, but at least eight: replays of any size, at the edges of each power of two too."""
    (tmp_path / "t.c").write_text(RING)
    program = compiled(tmp_path / "t.c", tmp_path / "t", "-x", "c++" if compiler == "g++" else "c", compiler=compiler)
    edges = [(256 << 20) // rings // places + more for rings in (1, 3) for places in (8, 64, 1024) for more in (-1, 0, 1, 16)]
    cases = [(size, rings) for size in (0, 16, *edges, 1 << 33) for rings in (1, 3)]
    arguments = [str(number) for case in cases for number in case]
    printed = subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout.split()
    assert [int(word) for word in reversed(printed)] == [places_of(size, (256 << 20) // rings) for size, rings in cases]
    assert {places_of(size) for size, _ in cases} >= {8, 1024}


WRONG_CALLS = r"""
#include "parity_dump.h"
int main(int argc, char **argv) {
    float row[4] = {0};
    int n = -5, tokens[1] = {7};
    parity_dump *d = parity_open(argv[1]);
    int failed = argc > 2 ? parity_header(d, "e", "m", 2, argv[2][0] == 'x' ? NULL : tokens, 1, argv[2][0] == 'x' ? "f32" : argv[2])
                          : parity_header(d, "e", "m", 2, tokens, 1, "f32") || parity_checkpoint(d, "embd", 0, row, PARITY_F32, n);
    fputs(parity_error(d), stdout);
    parity_close(d);
    return failed ? 3 : 0;
}
"""


@needs_gcc
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((), "embd: needs a name"),
        (("x",), "parity_header: a number of tokens, but no tokens"),
        (("fp4",), "parity_header: compute is not known: write f64, f32"),
        (("",), "parity_header: compute is not known: write f64, f32"),
    ],
)
def test_a_wrong_argument_is_an_error_and_no_crash(more: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    """A negative number of values, a number of tokens without tokens, an arithmetic that no reader knows: refused with a reason."""
    (tmp_path / "t.c").write_text(WRONG_CALLS)
    program = compiled(tmp_path / "t.c", tmp_path / "t", "-std=gnu99", "-fsanitize=address,undefined", "-g")
    done = subprocess.run([program, tmp_path / "c.jsonl", *more], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[: len(reason)]) == (3, reason), done.stderr
    for word in ("BF16", "fp16", "Float32"):  # which readers know
        done = subprocess.run([program, tmp_path / "c.jsonl", word], capture_output=True, text=True, check=False)
        assert done.stdout == ""


@needs_gcc
@pytest.mark.parametrize(
    ("compiler", "flags"),
    [("gcc", ("-std=gnu99", "-fsanitize=address,undefined", "-g")), ("g++", ("-std=c++17", "-O2", "-x", "c++"))],
)
def test_what_the_header_writes_is_what_the_python_writer_writes(compiler: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """C and C++, with sanitizers: values, statistics and sketches equal ours for all types, and four threads lose nothing."""
    (tmp_path / "t.c").write_text(PROGRAM)
    program = compiled(tmp_path / "t.c", tmp_path / "t", *flags, compiler=compiler)
    subprocess.run([program, tmp_path / "c.jsonl"], check=True)
    dump = read(tmp_path / "c.jsonl")
    assert (dump.notes, dump.skipped) == ((), 0)
    assert dump.header is not None
    assert (dump.header.source, dump.header.model.name, dump.header.tokens) == ('a "quoted" engine', "a model\n", (5, 6, 7))
    assert (dump.tokens[0].id, dump.tokens[0].text) == (9, '\t"x"')
    i = np.arange(40)
    first = ((i * i % 17).astype(np.float32) / np.float32(7) - np.float32(1)).astype(np.float32)
    second = first.copy()
    second[3], second[30] = np.nan, -np.inf
    halves = (i * 1543).astype(np.uint16).view(np.float16).astype(np.float32)
    brains = ((0x3F00 + i * 13).astype(np.uint32) << 16).view(np.float32)
    for point, array in (("embd", np.stack([first, second])), ("blk.5.q", halves[None]), ("blk.5.k", brains[None])):
        ours, theirs = summarise(point, array, np.arange(len(array))), dump.points[point]
        assert np.array_equal(ours.values, theirs.values, equal_nan=True)
        assert ours.stats.keys() == theirs.stats.keys()
        for name, column in ours.stats.items():
            assert theirs.stats[name] == pytest.approx(column, rel=1e-12), name  # float64 sums in another order
        assert ours.sketch is not None
        assert theirs.sketch == pytest.approx(ours.sketch, rel=1e-6, abs=1e-5)
    assert [dump.points[f"blk.{n}.l_out"].token_idx.tolist() for n in range(4)] == [list(range(50))] * 4
    assert dump.points["embd"].decode.tolist() == [False, True]
    assert dump.points["embd"].seq.tolist() == [0, 2]


@needs_gcc
def test_a_right_engine_in_c_is_clean_and_agrees(engine: Compiled, reference: Reference, stories: Path, parity: Cli) -> None:
    """Lint has no finding, and the comparison with llama.cpp is parity in exact mode."""
    engine.run(Path("ours.jsonl"))
    assert lint(read("ours.jsonl"), stories).findings == ()
    reference.dump(
        DumpJob(model=stories, out=Path("ref.jsonl").absolute(), tokens=TOKENS, points="embd,*.l_out,output_norm,logits")
    )
    code, answer = parity.json("diff", "ours.jsonl", "ref.jsonl")
    assert (code, answer["verdict"], answer["compared"]) == (0, "parity", 27 * len(TOKENS))


@needs_gcc
def test_swapped_buffers_are_linted_and_wrong_rope_is_diffed(
    engine: Compiled, reference: Reference, stories: Path, parity: Cli
) -> None:
    """The engine that is right but captures wrong is told so and not blamed; the one that rotates wrong is found at position 1."""
    engine.run(Path("swap.jsonl"), "swap")
    engine.run(Path("rope.jsonl"), "rope")
    reference.dump(
        DumpJob(model=stories, out=Path("ref.jsonl").absolute(), tokens=TOKENS, points="embd,*.l_out,output_norm,logits")
    )
    ran = parity("lint", "swap.jsonl", "--model", stories)
    assert ran.code == 1
    assert "same-vector" in ran.out
    assert "these values are blk.23.l_out" in " ".join(ran.out.split())
    code, answer = parity.json("diff", "swap.jsonl", "ref.jsonl")
    assert (code, answer["verdict"]) == (0, "parity")
    assert {fault["kind"] for fault in answer["record_faults"]} == {"moment"}
    assert parity("lint", "rope.jsonl", "--model", stories).code == 0
    code, answer = parity.json("diff", "rope.jsonl", "ref.jsonl")
    assert code == 1
    assert (answer["first_divergence"]["checkpoint"], answer["first_divergence"]["token_idx"]) == ("blk.0.l_out", 1)
    assert "RoPE" in answer["pattern"]["sentence"]


@needs_gcc
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_cuda_part_compiles(tmp_path: Path) -> None:
    """nvcc takes the header with PARITY_CUDA, and a call with a stream."""
    (tmp_path / "parity_dump.h").write_text(emit.source("c"))
    (tmp_path / "t.cu").write_text(CUDA)
    done = subprocess.run(["nvcc", "-c", "t.cu", "-o", "t.o"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


CUDA = r"""
#define PARITY_CUDA
#include "parity_dump.h"
__global__ void fill(float *x) { x[threadIdx.x] = threadIdx.x * 0.5f - 3; }
int main(int argc, char **argv) {
    parity_dump *d = parity_open(argc > 1 ? argv[1] : "cuda.jsonl");
    float *x, host[64] = {1, 2, 3};
    cudaStream_t stream;
    cudaStreamCreate(&stream);
    cudaMalloc(&x, 64 * sizeof *x);
    parity_header(d, "cuda", "m", 1, NULL, 0, "f32");
    fill<<<1, 64, 0, stream>>>(x);
    if (parity_checkpoint_device(d, "embd", 0, x, PARITY_F32, 64, stream)) return 1;
    cudaMemsetAsync(x, 0, 64 * sizeof *x, stream);
    if (parity_checkpoint(d, "blk.0.l_out", 0, host, PARITY_F32, 64)) return 2;
    if (!parity_checkpoint(d, "embd", 1, x, PARITY_F32, 64)) return 3;
    fprintf(stderr, "%s\n", parity_error(d));
    d->error[0] = 0;
    return parity_close(d) ? 4 : 0;
}
"""


@pytest.mark.gpu
@needs_gcc
def test_device_values_are_copied_in_their_stream(tmp_path: Path) -> None:
    """On a GPU: what the kernel wrote is recorded although it is overwritten at once; a device pointer in the host call is told."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or shutil.which("nvidia-smi") is None:
        pytest.skip("needs nvcc and a CUDA device")
    (tmp_path / "parity_dump.h").write_text(emit.source("c"))
    (tmp_path / "t.cu").write_text(CUDA)
    subprocess.run([nvcc, "t.cu", "-o", "t"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "t", tmp_path / "c.jsonl"], capture_output=True, text=True, check=True)
    assert "this is a device pointer; give it to parity_checkpoint_device" in done.stderr
    dump = read(tmp_path / "c.jsonl")
    assert dump.points["embd"].values[0].tolist() == [i * 0.5 - 3 for i in range(16)]
