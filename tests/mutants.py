"""Right dumps of every format, spoiled in seeded ways, and what becomes of them: for `benchmarks/fuzz.py` and its sample."""

import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from dumps import dump
from dumps import random as random_arrays
from safetensors.numpy import save_file

from checkpoints.errors import ParityError
from checkpoints.formats import load
from checkpoints.jsonl import Writer
from checkpoints.mapping import Mapping, read_mapping
from checkpoints.record import Dump, Token
from parity.commands.options import AnswerFormat, numbers
from parity.compare import Options
from parity.comparison_output import report, show_report
from parity.lint import lint
from parity.picture import compare_drawn

LOGS = Path(__file__).parent / "logs"
POINTS = ("embd", "blk.0.q", "blk.0.l_out", "logits")
NAMES = """layer_offset = -1
[names]
"h.{i}.q" = { point = "blk.{i}.q", rope_pairs = "norm", heads = 4 }
"h.{i}" = "blk.{i}.l_out"
wte = { point = "embd", transpose = true }
"""
NUMBERS = [
    *(
        b"1e400",
        b"-1e-400",
        b"NaN",
        b"nan",
        b"-inf",
        b"Infinity",
        b"null",
        b"true",
        b"-0",
        b"1e38",
        b"3.5e38",
        b"0x10",
        b"1_000",
    ),
    *(
        b"18446744073709551616",
        b"-9223372036854775809",
        b"9007199254740993",
        b"1099511627776",
        b"4294967296",
        b"-1",
        b"1.5",
        b'"7"',
    ),
    *(b"9" * 400, b"0." + b"3" * 5000, b"1" + b"0" * 20_000, b"[1]", b"{}", b'"\\ud800"', b"1e", b"--1", b"\xd9\xa3"),
]


def _lines() -> bytes:
    """Format 1 with a header, tokens, statistics and sketches."""
    path = Path("right.jsonl")
    arrays = random_arrays(POINTS, positions=3)
    whole = dump(arrays, tokens=(Token(3, 7, " x", ((7, 1.5), (3, 0.5))),))
    with Writer(path, whole.header) as writer:  # type: ignore[arg-type]
        for rows in whole.points.values():
            writer.rows(rows)
        for token in whole.tokens:
            writer.token(token)
    return path.read_bytes()


def _bare() -> bytes:
    """Bare lines as an engine prints them, a few of them long enough to be cut."""
    lines = []
    for name, array in random_arrays(POINTS, positions=3).items():
        for position, row in enumerate(array):
            values = ",".join(f"{x:f}" for x in np.tile(row, 6 if name == "logits" else 1)[: 300 if name == "logits" else 16])
            lines.append(
                f'{{"ts":"x","checkpoint":"{name}","token_idx":{position},"dtype":"f32","shape":"[1,384]","values":[{values}]}}\n'
            )
    return "".join(lines).encode()


def _log(kind: str, *, sums: bool = True) -> bytes:
    """The first and last tensors of a real log."""
    lines = (LOGS / f"eval-callback-{kind}.log").read_bytes().splitlines(keepends=True)
    if not sums:  # the oldest style: three values from the front, no sum
        lines = [
            b", ".join(line.split(b", ")[:3]) + b", ...],\n" if b"...," in line and b"]" in line else line for line in lines
        ]
        lines = [line for line in lines if b"sum =" not in line]
    return b"".join([*lines[:60], *lines[-20:]])


def _arrays(kind: str) -> bytes:
    arrays = {name: x[:3] for name, x in random_arrays(POINTS[:3], positions=3).items()}
    path = Path(f"right.{kind}")
    if kind == "npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    elif kind == "npy":
        np.save(path, arrays["blk.0.l_out"])
    else:
        save_file(arrays, path)
    return path.read_bytes()


def _tree(kind: str) -> dict[str, bytes]:
    """A real debugger tree of which the first modules and the head are kept, with their files."""
    with zipfile.ZipFile(LOGS / f"model-debugger-{kind}.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in files if name.endswith("_FULL_TENSORS.json"))
    root = json.loads(files[name])
    model = root["children"][0]
    model["children"] = [model["children"][0], model["children"][-1]]
    text = json.dumps(root, indent=1)
    kept = {file: data for file, data in files.items() if file.endswith(".safetensors") and file in text}
    return {name: text.encode(), **kept}


def right_files(kind: str) -> dict[str, bytes]:
    """The files of a right dump, by name; the first is the one that is mutated most. Writes into the working folder."""
    if kind.startswith("tree"):
        return _tree("printed" if "printed" in kind else "arrays")
    if kind == "map":
        arrays = random_arrays(("h.1.q", "h.1", "wte"), positions=3)
        save_file({**arrays, "wte": np.ascontiguousarray(arrays["wte"].T)}, "theirs.safetensors")
        return {"names.toml": NAMES.encode(), "theirs.safetensors": Path("theirs.safetensors").read_bytes()}
    return {NAMED.get(kind, f"dump.{kind}"): MAKERS[kind]()}


MAKERS: dict[str, Callable[[], bytes]] = {
    "lines": _lines,
    "bare": _bare,
    "old log": lambda: _log("middle", sums=False),
    "middle log": lambda: _log("middle"),
    "new log": lambda: _log("new"),
    "npy": lambda: _arrays("npy"),
    "npz": lambda: _arrays("npz"),
    "safetensors": lambda: _arrays("safetensors"),
}
NAMED = {"lines": "a.jsonl", "bare": "a.jsonl", "old log": "a.log", "middle log": "a.log", "new log": "a.log"}
KINDS = (*MAKERS, "tree", "tree printed", "map", "tokens")


def mutated(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """The data after one to four accidents."""
    for _ in range(draw.randint(1, 4)):
        data = draw.choice(ACCIDENTS)(data, draw, others)
    return data[: 1 << 20]


def _member(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """An archive with a spoiled member and right checksums, half of the time; else nothing."""
    if not data.startswith(b"PK") or draw.random() < 0.5:
        return b""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as spoiled:
        for number, name in enumerate(archive.namelist()):
            spoiled.writestr(name, mutated(archive.read(name), draw, others) if number == 0 else archive.read(name))
    return made.getvalue()


def _flip(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _i in range(draw.choice((1, 1, 3, 30)) if data else 0):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _cut(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _drop(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + data[at + draw.choice((1, 2, 10, 1000)) :]


def _insert(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    at = draw.randrange(len(data) + 1)
    put = draw.choice(
        (b"\0", b"\xff\xfe", b"\n", b"\r", b'"', b"[" * 3000, b"{" * 5, b'{"a":' * 2000, b"]", b"\\", b" " * 100, b"[...,")
    )
    return data[:at] + put + data[at:]


def _number(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    """One number becomes another, or something that is none."""
    places = [i for i in range(1, len(data)) if data[i : i + 1].isdigit() and not data[i - 1 : i].isalnum()]
    if not places:
        return data
    at = end = draw.choice(places)
    while end < len(data) and data[end : end + 1] in b"0123456789.eE+-":
        end += 1
    return data[:at] + draw.choice(NUMBERS) + data[max(end, at + 1) :]


def _lines_moved(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    """A line doubled, removed, or put elsewhere."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return data
    taken = lines.pop(draw.randrange(len(lines)))
    for _i in range(draw.choice((0, 1, 2, 3))):
        lines.insert(draw.randrange(len(lines) + 1), taken)
    return b"".join(lines)


def _word(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    """A quoted word, a key or a text, becomes another."""
    parts = data.split(b'"')
    if len(parts) < 3:
        return data
    words = (
        b"checkpoint",
        b"values",
        b"header",
        b"end",
        b"token",
        b"logits",
        b"blk.999999.q",
        b"",
        b"sketch",
        b"indices",
        b"\xff",
        b"seq",
    )
    parts[draw.randrange(len(parts) // 2) * 2 + 1] = draw.choice(words)
    return b'"'.join(parts)


def _mixed(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """A piece of another format in the middle."""
    other = draw.choice(others)
    begin, at = draw.randrange(len(other) + 1), draw.randrange(len(data) + 1)
    return data[:at] + other[begin : begin + draw.choice((50, 500, 5000))] + data[at:]


ACCIDENTS = (_flip, _cut, _drop, _insert, _number, _number, _number, _lines_moved, _word, _mixed)


def cases(kind: str, seeds: range, folder: Path) -> Iterator[tuple[int, Callable[[], str]]]:
    """(seed, what answers for its mutant) of each seed; the mutant's files lie in the folder until the next is asked for.

    The working folder must be one that may be written into.
    """
    others = [_bare()[:20_000], _log("new")[:20_000], _arrays("npz"), NAMES.encode()]
    if kind == "tokens":
        for seed in seeds:
            draw = random.Random(seed)
            yield seed, lambda draw=draw: _of_tokens(mutated(b"1,2,300..305", draw, others))  # type: ignore[misc]
        return
    files = right_files(kind)
    names = list(files)
    right = folder / "right"
    right.mkdir(exist_ok=True)
    for name, data in files.items():
        (right / name).write_bytes(data)
    ref = _load(right, kind, names[0])
    for seed in seeds:
        draw = random.Random(f"{kind} {seed}")
        spoiled = names[0] if len(names) == 1 or draw.random() < 0.9 else draw.choice(names[1:])
        wrong = folder / "wrong"
        wrong.mkdir(exist_ok=True)
        for name, data in files.items():
            (wrong / name).write_bytes(data if name != spoiled else _member(data, draw, others) or mutated(data, draw, others))
        yield seed, lambda: _answer(wrong, ref, kind, names[0])  # noqa: B023  # called before the next is made


def _load(folder: Path, kind: str, first: str) -> Dump:
    if kind == "map":
        return load(folder / "theirs.safetensors", read_mapping(folder / first))
    return load(folder if kind.startswith("tree") else folder / first, Mapping())


def _answer(folder: Path, ref: Dump, kind: str, first: str) -> str:
    """What `parity lint` and `parity diff` answer: "parity", "divergence", "unusable", or "refused" with one line."""
    try:
        found = _load(folder, kind, first)
        judged = lint(found)
        verdict, picture = compare_drawn(found, ref, Options())
        with redirect_stdout(io.StringIO()) as shown:
            show_report(report(verdict, found, ref, picture), AnswerFormat.JSON, html=None, junit=None)
        json.loads(shown.getvalue())
    except ParityError as error:
        return one_line(error)
    return verdict.verdict if judged.usable else "unusable"


def one_line(error: ParityError) -> str:
    """Raises AssertionError where what would be printed has several lines."""
    assert "\n" not in f"{error}{error.advice}", "an error of several lines"
    return "refused"


def _of_tokens(data: bytes) -> str:
    try:
        numbers(data.decode("utf-8", "surrogateescape"), "--tokens")
    except ParityError as error:
        return one_line(error)
    return "parity"
