"""Mutants of GGUF files through the commands that read models. Run: python benchmarks/fuzz.py gguf [-n 300] [--first SEED] [--log FILE]

Five architectures; accidents to metadata, the table of tensors, offsets, types, the tokenizer and the data. Each mutant takes the
place of the right model whose twin is in the cache, and one command is run on it: it must end in an answer, which a fresh cache
gives as well, or in one line. The seeds of those that do not are listed. With --log, a run that was stopped goes on where it was.
"""

import argparse
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import forked

from checkpoints.gguf_file import Contents, TensorEntry, contents, header_bytes
from checkpoints.gguf_values import ARRAY, STRING, Value, string_value

ARCHITECTURES = ("qwen2", "llama", "qwen3", "gemma3", "phi3")
COMMANDS: dict[str, tuple[str, ...]] = {
    "model": ("model", "{model}"),
    "tokens": ("tokens", "--model", "{model}", "--prompt", "Once upon"),
    "weights": ("weights", "--model", "{model}"),
    "run": ("run", "--model", "{model}", "--tokens", "5,6,7", "-o", "{folder}/run"),
    "isolate": ("isolate", "--model", "{model}", "--tokens", "5,6"),
    "twin": ("twin", "{model}", "-o", "{folder}/twin.gguf"),
}
SECONDS = 120  # for one command on a busy machine
_SHOWN = 20
_NUMBERS = (0, 1, 2, 3, 7, 255, 511, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)

Draw = random.Random
Accident = Callable[[Contents, bytes, Draw], bytes]


def _with(contents: Contents, data: bytes, metadata: dict[str, Value], tensors: list[TensorEntry]) -> bytes:
    return header_bytes(metadata, tensors) + data[contents.data :]


def metadata(contents: Contents, data: bytes, draw: Draw) -> bytes:
    """One value lost, of another type, or another number; or one of another model's keys."""
    values = dict(contents.metadata)
    key = draw.choice([name for name in values if not name.startswith("tokenizer.")])
    kind = draw.randrange(6)
    if kind == 0:
        del values[key]
    elif kind == 1:
        values[key] = Value(4, struct.pack("<I", draw.choice(_NUMBERS)))
    elif kind == 2:
        values[key] = Value(6, struct.pack("<f", draw.choice((0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf")))))
    elif kind == 3:
        values[key] = string_value(draw.choice(("", "\x1b[31m", "x" * 100_000, "llama", "gemma3", "\u202e")))
    elif kind == 4:
        values[key] = Value(7, b"\x01")
    else:
        keys = ("rope.scaling.factor", "rope.scale_linear", "attention.head_count", "expert_count", "attention.sliding_window")
        values[f"{contents.architecture}.{draw.choice(keys)}"] = Value(6, struct.pack("<f", draw.choice((0.0, 2.0, 8.0, -1.0))))
    return _with(contents, data, values, list(contents.tensors))


def table(contents: Contents, data: bytes, draw: Draw) -> bytes:
    """A tensor lost, renamed, twice, or of another shape."""
    tensors = list(contents.tensors)
    i = draw.randrange(len(tensors))
    tensor = tensors[i]
    kind = draw.randrange(4)
    if kind == 0:
        del tensors[i]
    elif kind == 1:
        tensors[i] = TensorEntry(
            draw.choice(("x", tensor.name.upper(), "blk.0.attn_q.weight", "")), tensor.ne, tensor.type, tensor.offset
        )
    elif kind == 2:
        tensors.append(tensor)
    else:
        sizes = list(tensor.ne)
        sizes[draw.randrange(len(sizes))] = draw.choice((0, 1, 32, 64, 1 << 20, 1 << 40, 1 << 63))
        tensors[i] = TensorEntry(tensor.name, tuple(sizes), tensor.type, tensor.offset)
    return _with(contents, data, dict(contents.metadata), tensors)


def offsets(contents: Contents, data: bytes, draw: Draw) -> bytes:
    """A tensor elsewhere: odd, on another, beyond the end."""
    tensors = list(contents.tensors)
    i = draw.randrange(len(tensors))
    at = draw.choice((0, 1, tensors[i].offset + 32, tensors[i - 1].offset, len(data), (1 << 63) - 1, (1 << 64) - 32))
    tensors[i] = TensorEntry(tensors[i].name, tensors[i].ne, tensors[i].type, at)
    return _with(contents, data, dict(contents.metadata), tensors)


def types(contents: Contents, data: bytes, draw: Draw) -> bytes:
    """A tensor of another type than its bytes, known or not."""
    tensors = list(contents.tensors)
    i = draw.randrange(len(tensors))
    tensor = tensors[i]
    tensors[i] = TensorEntry(
        tensor.name, tensor.ne, draw.choice((0, 1, 2, 8, 12, 14, 30, 4, 31, 99, (1 << 32) - 1)), tensor.offset
    )
    return _with(contents, data, dict(contents.metadata), tensors)


def tokenizer(contents: Contents, data: bytes, draw: Draw) -> bytes:
    """A key of the tokenizer lost or another, an array of it shorter or of another type."""
    values = dict(contents.metadata)
    key = draw.choice([name for name in values if name.startswith("tokenizer.")])
    value = values[key]
    if value.type == ARRAY and draw.random() < 0.7:
        kind, count = struct.unpack_from("<IQ", value.raw)
        if kind == STRING:
            texts = value.plain()[: draw.choice((0, 1, count // 2, count))]
            if texts:
                texts[draw.randrange(len(texts))] = draw.choice(("", "\x1b[2J", "x" * 5000, "a b", " "))
            raw = b"".join(struct.pack("<Q", len(text.encode())) + text.encode() for text in texts)
            values[key] = Value(ARRAY, struct.pack("<IQ", STRING, len(texts)) + raw)
        else:
            size = (len(value.raw) - 12) // max(count, 1)
            kept = draw.choice((0, 1, count // 2))
            values[key] = Value(ARRAY, struct.pack("<IQ", kind, kept) + value.raw[12 : 12 + kept * size])
    elif draw.random() < 0.5:
        del values[key]
    else:
        values[key] = Value(4, struct.pack("<I", draw.choice(_NUMBERS)))
    return _with(contents, data, values, list(contents.tensors))


def damage(contents: Contents, data: bytes, draw: Draw) -> bytes:
    """Bytes flipped, zeroed or cut, anywhere."""
    spoiled = bytearray(data)
    kind = draw.randrange(4)
    at = draw.randrange(len(spoiled)) if draw.random() < 0.7 else draw.randrange(contents.data)
    if kind == 0:
        spoiled[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        end = min(at + draw.choice((4, 64, 4096, 70_000)), len(spoiled))
        spoiled[at:end] = bytes(end - at)
    elif kind == 2:
        del spoiled[at:]
    else:
        end = min(at + draw.choice((4, 64)), len(spoiled))
        spoiled[at:end] = draw.randbytes(end - at)
    return bytes(spoiled)


ACCIDENTS: dict[str, Accident] = {
    "metadata": metadata,
    "table": table,
    "offsets": offsets,
    "types": types,
    "tokenizer": tokenizer,
    "data": damage,
}


@dataclass(frozen=True)
class Case:
    """What became of one mutant: "answer", "one line" or "failed", and then why."""

    seed: int
    architecture: str
    accident: str
    command: str
    became: str
    wrong: str
    seconds: float


def parity(command: str, cache: Path, **names: Path) -> tuple[int, str]:
    """Exit code and stderr."""
    return forked.command([word.format(**names) for word in COMMANDS[command]], cache, SECONDS)


def judge(command: str, model: Path, warm: Path, folder: Path) -> tuple[str, str]:
    """What became of a command on a mutant, and what is wrong with that (empty if nothing)."""
    cache = folder / "cache"
    shutil.copytree(warm, cache)
    code, message = parity(command, cache, model=model, folder=folder)
    if any(not char.isprintable() and char != "\n" for char in message):
        return "failed", f"control characters on stderr: {message[:200]!r}"
    if code == 2:
        lines = [line for line in message.splitlines() if not line.startswith("left out")]
        return (
            ("one line", "")
            if len(lines) == 1 and len(message) < 3000
            else ("failed", f"{len(lines)} lines: {message[-200:]!r}")
        )
    if code not in (0, 1):
        return "failed", f"exit {code}: {message[-300:]!r}"
    if "Warning" in message or "Traceback" in message:
        return "failed", f"exit {code} with a warning: {message[-300:]!r}"
    fresh, _ = parity(command, folder / "fresh", model=model, folder=folder)
    return ("answer", "") if fresh == code else ("failed", f"exit {code} with the cache of before, {fresh} with a fresh one")


def case(seed: int, models: dict[str, tuple[Path, Path]], top: str) -> Case:
    """Make the mutant of a seed and run its command on it."""
    draw = random.Random(f"gguf {seed}")
    architecture, accident, command = draw.choice(ARCHITECTURES), draw.choice(list(ACCIDENTS)), draw.choice(list(COMMANDS))
    model, warm = models[architecture]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=top) as folder:
        mutant = Path(folder, model.name)
        mutant.write_bytes(ACCIDENTS[accident](contents(model), model.read_bytes(), draw))
        try:
            became, wrong = judge(command, mutant, warm, Path(folder))
        except TimeoutError:
            became, wrong = "failed", f"more than {SECONDS} s"
    return Case(seed, architecture, accident, command, became, wrong, round(time.perf_counter() - began, 2))


def earlier(log: Path | None) -> list[Case]:
    """The cases that an interrupted or shorter run has written."""
    if log is None or not log.exists():
        return []
    return [Case(**json.loads(line)) for line in log.read_text().splitlines()]


def figures(cases: list[Case]) -> str:
    """A row a command, and the failures."""
    lines = [
        "| command | mutants | answers, confirmed by a fresh cache | one line | failed | median, slowest, s |",
        "|---" * 6 + "|",
    ]
    for name in [*COMMANDS, "all"]:
        own = [case for case in cases if name in (case.command, "all")]
        if own:
            counts = Counter(case.became for case in own)
            row = " | ".join(str(counts[became]) for became in ("answer", "one line", "failed"))
            seconds = [case.seconds for case in own]
            lines.append(f"| {name} | {len(own)} | {row} | {median(seconds):.1f}, {max(seconds):.1f} |")
    failures = [case for case in cases if case.wrong]
    lines += [
        f"  {case.seed}: {case.architecture}, {case.accident}, {case.command}: {case.wrong}" for case in failures[:_SHOWN]
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print the table and the failures; exit 1 where there was one."""
    parser = argparse.ArgumentParser(prog="fuzz.py gguf")
    parser.add_argument("-n", type=int, default=300, help="seeds from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no mutant after so long")
    parser.add_argument("--log", type=Path, help="a line a case; seeds that it has are not run again, so that a run goes on")
    given = parser.parse_args(arguments)
    forked.warm()
    cases = earlier(given.log)
    known = {case.seed for case in cases}
    until = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as top:
        models = {name: (Path(top, f"{name}.gguf"), Path(top, f"{name}-cache")) for name in ARCHITECTURES}
        for architecture, (model, warm) in models.items():
            words = ["synth", "--architecture", architecture, "--type", "q8_0", "-o", str(model)]
            code, message = forked.command(words, warm, SECONDS)
            if code or parity("run", warm, model=model, folder=Path(top, "first"))[0]:
                sys.exit(f"{architecture}: the right model does not pass: {message}")
        for seed in range(given.first, given.first + given.n):
            if seed in known:
                continue
            if time.monotonic() > until:
                break
            cases.append(case(seed, models, top))
            if cases[-1].wrong:
                print(f"  {seed}: {cases[-1].wrong}", file=sys.stderr, flush=True)
            if given.log is not None:
                with given.log.open("a") as log:
                    log.write(json.dumps(asdict(cases[-1])) + "\n")
    print(figures(cases))
    sys.exit(any(case.wrong for case in cases))
