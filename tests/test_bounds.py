"""Any dump under 10 MB is answered within 10 seconds of computing and 1 GB, and endless inputs are not waited for."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, refused

ROOT = Path(__file__).parent.parent
# The slowest of these, words in every number of 10 MB, takes 10 s of a processor that counts to two million in 0.04 s. What grows with
# the square of its size takes minutes.
SECONDS, COUNTING, MEMORY = 30, 0.04, 1 << 30
SIZE = 9_900_000


def lines(make: Callable[[int], bytes]) -> bytes:
    """As many lines as fit."""
    files: list[bytes] = []
    size = 0
    while size < SIZE:
        files.append(make(len(files)) + b"\n")
        size += len(files[-1])
    return b"".join(files[:-1])


def record(values: bytes, fields: bytes = b'"token_idx":0') -> bytes:
    return b'{"checkpoint":"embd",%b,"values":[%b]}' % (fields, values)


def many(text: bytes, size: int = SIZE - 200) -> bytes:
    """A list of this, as long as fits."""
    return b",".join([text] * (size // (len(text) + 1)))


def zeros() -> bytes:
    """A small archive that would unpack to gigabytes."""
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(1 << 24, np.float32))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for i in range(24):
            file.writestr(f"blk.{i}.l_out.npy", array.getvalue())
    return archive.getvalue()


def rows() -> bytes:
    """An array of millions of rows of one byte each."""
    array = io.BytesIO()
    np.save(array, np.ones((SIZE, 1), np.uint8))
    return array.getvalue()


def tensors(entries: Iterable[tuple[str, list[int], int, int]], data: int) -> bytes:
    """A safetensors file with these (name, shape, begin, end)."""
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [a, b]} for name, shape, a, b in entries})
    return struct.pack("<Q", len(header)) + header.encode() + bytes(data)


# Exit codes of `lint`: what no engine writes is refused (2), numbers that no engine computes make a dump unusable (1).
REFUSED = (
    "names.jsonl",
    "long-name.jsonl",
    "headers.jsonl",
    "zeros.npz",
    "rows.npy",
    "overlap.safetensors",
    "many.safetensors",
    "nested.jsonl",
    "number.jsonl",
    "braces.jsonl",
)
UNUSABLE = (
    "one-line.jsonl",
    "words.jsonl",
    "mixed-words.jsonl",
    "sparse-words.jsonl",
    "statistics-words.jsonl",
    "huge.jsonl",
    "texts.jsonl",
    "tokens.jsonl",
    "indices.jsonl",
)
FILES: dict[str, Callable[[], bytes]] = {
    "one-shape.jsonl": lambda: record(b"1", b'"token_idx":0,"shape":[%b]' % many(b"1")),
    "shapes.jsonl": lambda: lines(lambda i: record(b"1.5", b'"token_idx":%d,"shape":[%b]' % (i, many(b"1", 800)))),
    "names.jsonl": lambda: lines(lambda i: b'{"checkpoint":"n%d","token_idx":0,"values":[1]}' % i),
    "long-name.jsonl": lambda: b'{"checkpoint":"%b","token_idx":0,"values":[1]}\n' % (b"x" * (SIZE - 100)),
    "points.jsonl": lambda: b"".join(b'{"checkpoint":"n%d","token_idx":0,"values":[1.5]}\n' % i for i in range(10_000)),
    "one-line.jsonl": lambda: record(many(b"1")),
    "digits.jsonl": lambda: lines(lambda i: record(b"0,1,2,3,4,5,6,7,8,9," * 10 + b"0", b'"token_idx":%d' % i)),
    "words.jsonl": lambda: record(many(b"nan")),
    "mixed-words.jsonl": lambda: record(many(b'nan,NaN,"NaN",-inf,Infinity,null,-nan(ind),0.123456,1e-5')),
    "sparse-words.jsonl": lambda: lines(lambda i: record(b"0.25,-3.5," * 8 + b"nan", b'"token_idx":%d' % i)),
    "statistics-words.jsonl": lambda: lines(lambda i: record(b"nan,inf", b'"token_idx":%d,"stats":{"sum":nan,"l2":inf}' % i)),
    "huge.jsonl": lambda: record(many(b"1e999,1")),
    "texts.jsonl": lambda: record(many(b'"1.5"')),
    "short.jsonl": lambda: lines(lambda i: record(b"1", b'"token_idx":%d' % i)),
    "steps.jsonl": lambda: lines(lambda i: record(b"%d" % i, b'"token_idx":0,"step":%d' % i)),
    "statistics.jsonl": lambda: lines(lambda i: record(b"1", b'"token_idx":%d,"stats":{"s%d":1}' % (i, i))),
    "headers.jsonl": lambda: record(b"1") + b"\n" + lines(lambda i: b'{"type":"header","source":"x"}'),
    "tokens.jsonl": lambda: record(b"1") + b"\n" + lines(lambda i: b'{"type":"token","token_idx":%d,"id":1}' % i),
    "indices.jsonl": lambda: record(
        many(b"1", 1_600_000), b'"token_idx":0,"indices":[%b]' % b",".join(b"%d" % i for i in range(800_000))
    ),
    "scattered.jsonl": lambda: lines(
        lambda i: record(b"1,2", b'"token_idx":%d' % i + (b',"indices":[0,1]' if i % 2 else b',"indices":[3,5]'))
    ),
    "nested.jsonl": lambda: record(b"1", b'"x":%b%b,"token_idx":0' % (b"[" * 4_900_000, b"]" * 4_900_000)),
    "number.jsonl": lambda: record(b"1" * (SIZE - 100)),
    "braces.jsonl": lambda: b"{" * SIZE,
    "sequences.jsonl": lambda: lines(lambda i: b'{"checkpoint":"embd","seq":%d,"values":[1]}' % i),
    "braces-of-a-log.jsonl": lambda: record(b"1") + b"\n" + lines(lambda i: b"# {llama %d" % i),
    "zeros.npz": zeros,
    "rows.npy": rows,
    "overlap.safetensors": lambda: tensors(((f"blk.{i}.l_out", [1, 1 << 18], 0, 1 << 20) for i in range(2000)), 1 << 20),
    "many.safetensors": lambda: tensors(((f"n{i}", [1, 1], 4 * i, 4 * i + 4) for i in range(100_000)), 400_000),
}


def seconds() -> int:
    """`SECONDS`, or more on a slower processor."""
    began = time.process_time()
    for _ in range(2_000_000):
        pass
    return round(SECONDS * max(1.0, (time.process_time() - began) / COUNTING))


def bounded(*words: object) -> tuple[int, str]:
    """Run parity with at most `SECONDS` of computing and `MEMORY` beyond its modules; its exit code and last words."""
    limit = seconds()
    modules = 1 << 30  # of address space: what NumPy, OpenBLAS and pandas map
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "parity", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: (
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY + modules, MEMORY + modules)),
        ),
        check=False,
    )
    return ran.returncode, ran.stderr[-300:]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_small_dump_is_answered_soon_and_in_little_memory(tmp_path: Path, name: str) -> None:
    """Each of these, which took minutes or gigabytes, ends in an answer or one line."""
    path = tmp_path / name
    path.write_bytes(FILES[name]())
    assert path.stat().st_size < 10_000_000
    code, printed = bounded("lint", path)
    assert code == (2 if name in REFUSED else 1 if name in UNUSABLE else 0), printed
    assert "not enough memory" not in printed
    assert len(printed.splitlines()) == (code == 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("words.jsonl", 1, ""),  # NaN in each record: it cannot be compared, which is no parity
        ("mixed-words.jsonl", 0, ""),
        ("statistics-words.jsonl", 2, "no record could be compared"),
        ("one-line.jsonl", 0, ""),
        ("digits.jsonl", 0, ""),
    ],
)
def test_a_small_dump_is_compared_and_converted_soon(tmp_path: Path, name: str, code: int, words: str) -> None:
    """Commands that do more with the dumps that take longest to read stay within the same bounds; `code` is that of `diff`."""
    path, converted = tmp_path / name, tmp_path / "converted.jsonl"
    path.write_bytes(FILES[name]())
    ended, printed = bounded("diff", path, path)
    assert (ended, words in printed, bool(printed)) == (code, True, bool(words))
    ended, printed = bounded("convert", path, "-o", converted)
    assert (ended, printed.startswith(str(converted)), len(printed.splitlines())) == (0, True, 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("names.jsonl", "names.jsonl has more than 32,768 names"),
        ("long-name.jsonl", "long-name.jsonl has a name of"),
        ("headers.jsonl", "headers.jsonl has more than 100 headers"),
        pytest.param("zeros.npz", "neither activations nor weights compress so well", marks=pytest.mark.slow),
        ("overlap.safetensors", "two of its arrays overlap"),
        pytest.param("many.safetensors", "100,000 arrays", marks=pytest.mark.slow),
        ("rows.npy", "more positions than any context has"),
    ],
)
def test_what_no_engine_writes_is_refused_by_its_reason(parity: Cli, tmp_path: Path, name: str, reason: str) -> None:
    """The error line says which quantity is too large."""
    (tmp_path / name).write_bytes(FILES[name]())
    refused(parity("lint", name), reason)


def test_a_header_of_impossible_sizes_is_one_line(parity: Cli, tmp_path: Path) -> None:
    """An array whose header claims more than there can be is refused without NumPy's warnings."""
    with (tmp_path / "embd.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 60, 4)})
    refused(parity("lint", "embd.npy"), "cannot read embd.npy: array is too big")


def test_a_pipe_or_a_device_is_not_waited_for(parity: Cli, stories_run: Path) -> None:
    """A dump, a mapping, a prompt or an answer that is a pipe without a writer, or a device without an end, is refused."""
    os.mkfifo("pipe")
    dump = stories_run / "ours.jsonl"
    refused(parity("lint", "pipe"), "pipe is a pipe", "give - and pipe JSON lines in")
    refused(parity("diff", dump, "/dev/zero"), "/dev/zero is a device")
    refused(parity("lint", dump, "--map", "/dev/zero"), "/dev/zero is a device")
    refused(parity("lint", dump, "--map", "pipe"), "pipe is a pipe")
    refused(parity("tokens", "--prompt-file", "pipe"), "pipe is a pipe")
    refused(parity("diff", dump, dump, "--html", "r.html", "--include", "pipe"), "pipe is a pipe")
    refused(parity("weights", "--theirs", "pipe"), "pipe is a pipe")
    refused(parity("score", "--text", "pipe", "--exec", "true"), "pipe is a pipe")
    refused(parity("drift", "history", "--ledger", "pipe", "."), "pipe is a pipe")


@pytest.mark.parametrize(
    "name", ["x.npy", "x.npz", "x.safetensors", "x.pt", "edgellm_dump.safetensors", "m_debug_tree_FULL_TENSORS.json"]
)
def test_a_pipe_in_a_folder_is_not_waited_for(parity: Cli, tmp_path: Path, name: str) -> None:
    """A pipe in a folder under the name of an array, a tree or a debugger's file is refused, not waited for."""
    os.mkfifo(tmp_path / name)
    refused(parity("lint", tmp_path), f"{name} is ")
    (tmp_path / "config.json").write_text("{}")
    if name == "x.safetensors":
        refused(parity("weights", "--hf", tmp_path), f"{name} is a pipe")


def test_a_closed_standard_input_is_said() -> None:
    """`-` without a standard input is one line, not an internal error."""
    words = f"exec {sys.executable} -P -m parity lint - <&-"
    ran = subprocess.run(["sh", "-c", words], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert (ran.returncode, ran.stderr.decode().splitlines()) == (
        2,
        ["parity: standard input is closed. Pipe JSON lines in, or name a file."],
    )


def test_json_lines_can_be_piped_in(stories_run: Path) -> None:
    """`-` is standard input, for `lint` and for either side of `diff`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for words in (("lint", "-"), ("diff", "-", stories_run / "ref.jsonl")):
        with (stories_run / "ours.jsonl").open("rb") as file:
            ran = subprocess.run(
                [sys.executable, "-P", "-m", "parity", *words], stdin=file, env=environment, capture_output=True, check=False
            )
        assert (ran.returncode, ran.stderr) == (0, b"")


def test_a_folder_has_a_limit_as_a_file_has(parity: Cli, tmp_path: Path) -> None:
    """Many files of arrays, each within its bounds, are refused for their total size."""
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 1 << 26), np.float32))
    for layer in range(5):
        with (tmp_path / f"blk.{layer}.l_out.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + (1 << 28))  # a hole: no disk is taken
    refused(parity("lint", tmp_path), "are more than 1 GiB together")


def test_more_arrays_than_a_model_has_points_are_refused(parity: Cli, tmp_path: Path) -> None:
    """Each array costs as much as a record of any width: their number has a limit, and the line says so."""
    path = tmp_path / "many.safetensors"
    path.write_bytes(tensors(((f"blk.{i % 100}.x{i // 100}", [1, 2], 0, 8) for i in range(10_001)), 8))
    refused(parity("lint", path), "10,001")
