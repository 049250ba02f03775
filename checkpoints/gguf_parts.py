"""The files of a split model: model-00001-of-00003.gguf and its neighbours, as llama-gguf-split writes them.

llama.cpp is given the first part and finds the others by name (`llama_split_path` in llama.cpp). So does parity; what llama.cpp
would refuse, and a part of another model, is one line that names the part.
"""

import re
from pathlib import Path

from .errors import ModelError

_NAME = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.gguf", re.DOTALL)
_MOST = 0xFFFF  # split.count is 16 bits wide


def part_path(first: Path, number: int, count: int) -> Path:
    """Where part `number` (from 1) of `count` lies, by the name of the first.

    Raises:
        ModelError: the first part has no such name.
    """
    match = _NAME.fullmatch(first.name)
    if match is None or (int(match[2]), int(match[3])) != (1, count):
        raise ModelError(
            f"{first} is the first of {count} parts of a split model, and the others cannot be found by its name.",
            f"Name it {first.stem if match is None else match[1]}-00001-of-{count:05d}.gguf, as the other parts are.",
            code="split",
        )
    return first.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")


def files_of(path: Path) -> list[Path]:
    """The files of a model by its name alone: those of a split one's parts that exist, else the file itself."""
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[2]) != 1:
        return [path]
    files = [part_path(path, number, int(match[3])) for number in range(2, min(int(match[3]), _MOST) + 1)]
    return [path, *(file for file in files if file.exists())]


def not_first(path: Path, number: int, count: int) -> ModelError:
    """The error of a part that was named instead of the first one; `number` counts from 1."""
    match = _NAME.fullmatch(path.name)
    first = f"{match[1]}-00001-of-{count:05d}.gguf" if match else "the first part"
    return ModelError(f"{path} is part {number} of {count} of a split model.", f"Name {first}.", code="split")


def other_part(path: Path, number: int, count: int, problem: str) -> ModelError:
    """The error of a part that does not belong to the first one; `number` counts from 1."""
    return ModelError(
        f"{path} is not part {number} of {count} of this model: {problem}.",
        "Put all parts of one model into one folder, or join them (llama-gguf-split --merge).",
        code="split",
    )


def missing_part(path: Path, number: int, count: int) -> ModelError:
    """The error of a part that is not there; `number` counts from 1."""
    return ModelError(
        f"part {number} of {count} of the model is missing: {path} does not exist.",
        "Put all parts of the model into one folder.",
        code="split",
    )
