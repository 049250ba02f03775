"""Right dumps of every format, damaged in seeded ways, and how each is answered: for `benchmarks/fuzz.py` and its sample."""

import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import weight_mutants
from accidents import archived, mutated
from dumps import dump
from dumps import random as random_arrays
from safetensors.numpy import save_file
from weight_mutants import one_line

from checkpoints.columns import ColumnsWriter, beside
from checkpoints.errors import ParityError
from checkpoints.formats import load
from checkpoints.jsonl import Writer
from checkpoints.mapping import Mapping, read_mapping
from checkpoints.record import Dump, Token
from parity.commands.comparison_output import report, show_report
from parity.commands.options import AnswerFormat
from parity.diff.compare import comparison
from parity.lint.lint import lint
from parity.run.prompt import numbers

LOGS = Path(__file__).parent / "logs"
POINTS = ("embd", "blk.0.l_out", "logits")
NAMES = """layer_offset = -1
[names]
"h.{i}.q" = { point = "blk.{i}.q", rope_pairs = "norm", heads = 4 }
"h.{i}" = "blk.{i}.l_out"
wte = { point = "embd", transpose = true }
"""


def _lines() -> bytes:
    """Format 1 with a header, tokens, statistics and sketches."""
    path = Path("right.jsonl")
    arrays = random_arrays(POINTS, positions=2)
    whole = dump(arrays, tokens=(Token(2, 7, " x", ((7, 1.5), (3, 0.5))),))
    with Writer(path, whole.header) as writer:  # type: ignore[arg-type]
        for rows in whole.points.values():
            writer.rows(rows)
        for token in whole.tokens:
            writer.token(token)
    return path.read_bytes()


def _bare() -> bytes:
    """Bare lines as an engine prints them, a few of them long enough to be cut."""
    lines = []
    for name, array in random_arrays(POINTS, positions=2).items():
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
    return b"".join([*lines[:36], *lines[-14:]])


def _arrays(kind: str) -> bytes:
    arrays = random_arrays(POINTS[:2], positions=2)
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


def _zipped(name: str) -> dict[str, bytes]:
    """The files of a folder that a foreign debugger left."""
    with zipfile.ZipFile(LOGS / f"{name}.zip") as archive:
        return {file: archive.read(file) for file in archive.namelist()}


def _binary() -> dict[str, bytes]:
    """Records as arrays beside the lines, with statistics, sketches and a generated token."""
    whole = dump(random_arrays(POINTS, positions=2), tokens=(Token(2, 7, " x", ((7, 1.5), (3, 0.5))),))
    with ColumnsWriter("binary.jsonl", whole.header) as writer:  # type: ignore[arg-type]
        for rows in whole.points.values():
            writer.rows(rows)
        for token in whole.tokens:
            writer.token(token)
    return {name: Path(name).read_bytes() for name in ("binary.jsonl", beside("binary.jsonl").name)}


def _edge() -> dict[str, bytes]:
    """Two rounds of Edge-LLM's layer debugger."""
    cache = next(iter(random_arrays(("embd",), positions=4).values()))[:, :16]
    pairs = np.ascontiguousarray(np.broadcast_to(cache.reshape(1, 1, 1, 4, 16), (1, 2, 1, 4, 16)), np.float32)
    arrays: dict[str, np.ndarray] = {}
    for number in range(2):
        arrays |= {f"round_{number}.logits": cache[:1], f"round_{number}.layer_0.kv": pairs}
        arrays |= {
            f"round_{number}.{name}": np.array([3 + number], np.int32) for name in ("context_lengths", "generated_token_ids")
        }
    save_file(arrays, "edge.safetensors")
    return {"edgellm_dump.safetensors": Path("edge.safetensors").read_bytes()}


def _vllm() -> dict[str, bytes]:
    """Two layers of a request of three tokens."""
    states = np.stack([*random_arrays(("embd", "blk.0.l_out"), positions=3).values()], axis=1)
    save_file({"hidden_states": states, "token_ids": np.array([1, 403, 407], np.int64)}, "vllm.safetensors")
    return {"request.safetensors": Path("vllm.safetensors").read_bytes()}


def _llama_debug() -> dict[str, bytes]:
    """Logits of the last of three tokens, with ids and prompt beside."""
    logits = random_arrays(("logits",), positions=1)["logits"]
    ids = np.array([1, 403, 407], np.int32).tobytes()
    prompt = b"prompt: Once upon\nn_tokens: 3\ntoken ids: 1, 403, 407\n"
    return {
        "llamacpp-m.bin": logits.astype(np.float32).tobytes(),
        "llamacpp-m-tokens.bin": ids,
        "llamacpp-m-prompt.txt": prompt,
    }


FOLDERS: dict[str, Callable[[], dict[str, bytes]]] = {
    "torch": lambda: {"kinds.pt": _zipped("torch-save")["kinds.pt"]},
    "sglang": lambda: dict(list(_zipped("sglang-dumper").items())[3:8]),
    "sglang hook": lambda: _zipped("sglang-hook"),
    "sglang modules": lambda: dict(list(_zipped("sglang-modules").items())[1:9]),
    "tensorrt-llm": lambda: {Path(name).name: data for name, data in list(_zipped("tensorrt-llm").items())[2:6]},
    "edge-llm": _edge,
    "llama-debug": _llama_debug,
    "vllm": _vllm,
    "debug mode": lambda: {"debug.log": (LOGS / "debug-mode.log").read_bytes()},
    "binary": _binary,
}
BESIDE = {"binary": 0.6}  # how often another file than the first is damaged
WHOLE = ("torch", "sglang", "sglang hook", "sglang modules", "tensorrt-llm", "edge-llm")  # the folder is the dump


def right_files(kind: str) -> dict[str, bytes]:
    """The files of a right dump, by name; the first is the one that is mutated most. Writes into the working folder."""
    if kind in FOLDERS:
        return FOLDERS[kind]()
    if kind.startswith("tree"):
        return _tree("printed" if "printed" in kind else "arrays")
    if kind == "map":
        arrays = random_arrays(("h.1.q", "h.1", "wte"), positions=2)
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
KINDS = (*MAKERS, "tree", "tree printed", "map", "tokens", *FOLDERS, *weight_mutants.KINDS)


def cases(kind: str, seeds: range, folder: Path) -> Iterator[tuple[int, Callable[[], str]]]:
    """For each seed (seed, a function that gives the answer for its mutant); the mutant's files stay in the folder until the next one.

    The working folder must be writable.
    """
    if kind in weight_mutants.KINDS:
        yield from weight_mutants.cases(kind, seeds, folder)
        return
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
        (right / name).parent.mkdir(parents=True, exist_ok=True)
        (right / name).write_bytes(data)
    ref = _load(right, kind, names[0])
    for seed in seeds:
        draw = random.Random(f"{kind} {seed}")
        spoiled = names[0] if len(names) == 1 or draw.random() < 1 - BESIDE.get(kind, 0.1) else draw.choice(names[1:])
        wrong = folder / "wrong"
        wrong.mkdir(exist_ok=True)
        for name, data in files.items():
            (wrong / name).parent.mkdir(parents=True, exist_ok=True)
            (wrong / name).write_bytes(data if name != spoiled else archived(data, draw, others) or mutated(data, draw, others))
        yield seed, lambda: _answer(wrong, ref, kind, names[0])  # noqa: B023  # called before the next is made


def _load(folder: Path, kind: str, first: str) -> Dump:
    if kind == "map":
        return load(folder / "theirs.safetensors", read_mapping(folder / first))
    return load(folder if kind.startswith("tree") or kind in WHOLE else folder / first, Mapping())


def _answer(folder: Path, ref: Dump, kind: str, first: str) -> str:
    """What `parity lint` and `parity diff` answer: "parity", "divergence", "unusable", or "refused" with one line."""
    try:
        dump = _load(folder, kind, first)
        judged = lint(dump)
        compared = comparison(dump, ref)
        with redirect_stdout(io.StringIO()) as shown:
            show_report(report(compared.verdict, dump, ref, compared.picture), AnswerFormat.JSON, html=None, junit=None)
        json.loads(shown.getvalue())
    except ParityError as error:
        return one_line(error)
    return compared.verdict.verdict if judged.usable else "unusable"


def _of_tokens(data: bytes) -> str:
    try:
        numbers(data.decode("utf-8", "surrogateescape"), "--tokens")
    except ParityError as error:
        return one_line(error)
    return "parity"
