"""Folders of Hugging Face and weights that an engine dumped, damaged in seeded ways, and how `parity weights` answers."""

import io
import json
import random
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import conversion_cases
import numpy as np
import packed_cases
from accidents import archived, mutated
from msgspec import Struct
from safetensors.numpy import save_file

from checkpoints.answers.weights import WeightsCheck
from checkpoints.errors import ParityError
from parity.commands.options import Format
from parity.commands.output import answer as print_answer
from parity.weights.conversion import check_conversion
from parity.weights.foreign_weights import check_foreign
from reports import weights as report

TOKENIZER = {"bos_token": "<s>", "added_tokens_decoder": {"1": {"content": "<s>"}, "2": {"content": "</s>"}}}
SCALING = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}


class _Right(Struct):
    """A model, the folder or file beside it, and the names that are damaged in it."""

    model: Path
    place: Path
    names: list[str]


def _plain(folder: Path, number: int) -> _Right:
    """A family whose tensors converters take apart, with a configuration, a generation's and a tokenizer's."""
    case = conversion_cases.CASES[number % len(conversion_cases.CASES)]()
    place = conversion_cases.folder_of(case, folder / "right")
    more = {"config.json": case.config | SCALING | {"rms_norm_eps": 1e-6, "num_attention_heads": conversion_cases.HEADS}}
    more |= {"generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 3]}, "tokenizer_config.json": TOKENIZER}
    for name, content in more.items():
        (place / name).write_text(json.dumps(content), encoding="utf-8")
    model = conversion_cases.write(folder / "m.gguf", case.architecture, case.right)
    return _Right(model, place, ["model.safetensors", "config.json", "generation_config.json", "tokenizer_config.json"])


def _packed(folder: Path, number: int) -> _Right:
    """Weights with scales of their own."""
    case = packed_cases.CASES[number % len(packed_cases.CASES)]()
    place = packed_cases.folder_of(case, folder / "right")
    model = conversion_cases.write(folder / "m.gguf", case.architecture, case.right)
    return _Right(model, place, ["model.safetensors", "config.json"])


def _theirs(folder: Path, number: int) -> _Right:
    """What an engine holds after loading, as JSON lines, npz or safetensors."""
    case = packed_cases.gptq()
    model = conversion_cases.write(folder / "m.gguf", case.architecture, case.right)
    weights = {name: np.asarray(values, np.float32) for name, values in case.right.items()}
    place = folder / "right"
    place.mkdir()
    name = ("weights.jsonl", "weights.npz", "weights.safetensors")[number % 3]
    if number % 3 == 0:
        lines = ({"name": key, "values": values.ravel()[:100].tolist()} for key, values in weights.items())
        (place / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    elif number % 3 == 1:
        np.savez(place / name, **weights)  # type: ignore[arg-type]
    else:
        save_file(weights, place / name)
    return _Right(model, place, [name])


KINDS: dict[str, tuple[int, Callable[[Path, int], _Right]]] = {
    "hf folder": (len(conversion_cases.CASES), _plain),
    "hf packed": (len(packed_cases.CASES), _packed),
    "their weights": (3, _theirs),
}


def cases(kind: str, seeds: range, folder: Path) -> Iterator[tuple[int, Callable[[], str]]]:
    """As `mutants.cases`, for `parity weights`: "parity" if nothing is found, else "divergence", or "refused" with one line."""
    count, make = KINDS[kind]
    rights: dict[int, _Right] = {}
    for seed in seeds:
        if seed % count not in rights:
            (own := folder / f"case-{seed % count}").mkdir()
            rights[seed % count] = make(own, seed % count)
        right = rights[seed % count]
        draw = random.Random(f"{kind} {seed}")
        spoiled = right.names[0] if draw.random() < 0.6 else draw.choice(right.names)
        others = [b'{"a": [1, 2.5]}\n' * 50, (right.place / right.names[0]).read_bytes()[:20_000]]
        wrong = folder / "wrong"
        wrong.mkdir(exist_ok=True)
        for old in wrong.iterdir():
            old.unlink()
        for file in right.place.iterdir():
            data = file.read_bytes()
            damaged = data if file.name != spoiled else archived(data, draw, others) or mutated(data, draw, others)
            (wrong / file.name).write_bytes(damaged)
        yield seed, partial(_answer, kind, right, wrong)


def _answer(kind: str, right: _Right, wrong: Path) -> str:
    try:
        theirs = kind == "their weights"
        return _shown(check_foreign(right.model, wrong / right.names[0]) if theirs else check_conversion(right.model, wrong))
    except ParityError as error:
        return one_line(error)


def _shown(answer: WeightsCheck) -> str:
    for form in (Format.TEXT, Format.JSON):
        with redirect_stdout(io.StringIO()) as shown:
            print_answer(answer, report, form)
    json.loads(shown.getvalue())
    return "parity" if answer else "divergence"


def one_line(error: ParityError) -> str:
    """The error's text. Raises AssertionError if it would be printed on several lines."""
    assert "\n" not in f"{error}{error.advice}", "an error of several lines"
    return "refused"
