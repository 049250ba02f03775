"""How the texts of options become values, and which texts are refused."""

import re
from collections.abc import Iterable
from os.path import abspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from checkpoints.errors import InputError
from checkpoints.gguf_parts import files_of
from checkpoints.whole_file import is_special

from ...run.prompt import given_prompt, numbers

if TYPE_CHECKING:
    from checkpoints.mapping import Mapping

_LAYERS = re.compile(r"0*[1-9][0-9]{0,8}")  # int() takes other digits, too, and no text of thousands
Given = dict[str, Any]  # fields of a request by name: `Request(**given)`


def keep_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse to overwrite an input, a part of a split model that is one, or another output.

    Raises:
        InputError: one of `outputs` is one of `inputs`, stands twice, or is "-".
    """
    outputs = list(outputs)
    if Path("-") in outputs:
        raise InputError('"-" is standard input, which nothing is written to.', "Name a file, or /dev/stdout.", code="output")
    files = [Path(abspath(path)) for path in outputs if not is_special(path)]  # noqa: PTH100 - resolve() fails at loops of links
    if len(set(files)) < len(files):
        twice = next(path for path in files if files.count(path) > 1)
        raise InputError(f"{twice} is given for two outputs.", "Give each a file of its own.", code="output")
    read = [file for path in inputs if path.exists() for file in files_of(path)]
    for out in outputs:
        if out.exists() and any(out.samefile(path) for path in read):
            raise InputError(
                f"{out} is an input of this command and must not be overwritten.", "Write to another file.", code="output"
            )


def mapping(names: Path | None, offset: int | None) -> "Mapping":
    """--map and --offset as one mapping: what names mean and what is added to positions; --offset replaces the file's own offset.

    Raises:
        InputError: the mapping cannot be read.
    """
    from msgspec.structs import replace

    from checkpoints.mapping import Mapping, read_mapping

    read = read_mapping(names) if names is not None else Mapping()
    return read if offset is None else replace(read, position_offset=(read.position_offset or 0) + offset)


def tolerance(given: float | None) -> float | None:
    """`--tolerance`, refused before anything is run with it.

    Raises:
        InputError: it is not a finite number ≥ 0.
    """
    if given is not None:
        from ...diff.limits import require_tolerance

        require_tolerance(given)
    return given


def devices(text: str | None) -> tuple[int, ...]:
    """`--devices` as numbers; empty for the backend's own choice.

    Raises:
        InputError: they are not numbers, or one occurs twice.
    """
    listed = numbers(text, "--devices") if text is not None else ()
    if len(set(listed)) < len(listed):
        raise InputError(f"--devices {text} names a device more than once.", "Name each device once.", code="devices")
    return listed


def positions(text: str) -> Literal["all", "last"] | tuple[int, ...]:
    """`--positions` in the form that the engine and the reference take."""
    from checkpoints.reading.fields import POSITIONS

    if text == "all":
        return "all"
    if text == "last":
        return "last"
    listed = numbers(text, "--positions")
    if not listed or min(listed) < 0 or max(listed) >= POSITIONS:
        raise InputError(f"--positions {text!r} is not valid.", "Write all, last, or a list such as 0,3,7.")
    return listed


def window(text: str) -> int | Literal["auto", "off"]:
    """`--window` in the form that the reference takes."""
    if text == "auto":
        return "auto"
    if text == "off":
        return "off"
    if not _LAYERS.fullmatch(text):
        raise InputError(f"--window must be auto, off or a number of layers, not {text!r}.", "Write e.g. --window 4.")
    return int(text)


def layers(text: str | None) -> tuple[int, ...] | None:
    """`--layers` in the form that the request takes."""
    return numbers(text, "--layers") if text is not None else None


def model_path(path: Path | None) -> Path:
    """`--model`, otherwise the embedded model."""
    from ...models.embedded import path as embedded

    return path or embedded()


def prompt_fields(prompt: str | None, prompt_file: Path | None, tokens: str | None) -> Given:
    """The prompt's text or its token ids. Raises InputError unless exactly one of the three options was given."""
    text, ids = given_prompt(prompt, prompt_file, tokens)
    return {"prompt": text, "tokens": ids}


def text_field(prompt: str | None, prompt_file: Path | None) -> Given:
    """The prompt's text. Raises InputError unless exactly one of the two options was given."""
    return {"prompt": given_prompt(prompt, prompt_file, None)[0]}


def optional_prompt_fields(prompt: str | None, prompt_file: Path | None, tokens: str | None) -> Given:
    """The same for a command that needs no prompt: neither text nor ids if none of the three was given."""
    if all(text is None for text in (prompt, prompt_file, tokens)):
        return {"prompt": None, "tokens": None}
    return prompt_fields(prompt, prompt_file, tokens)


def command_fields(command: str | None, shell: str | None, timeout: float | None, default: float | None = None) -> Given:
    """The user's engine, if one was given. It is stopped after `default` seconds, if `timeout` does not say otherwise."""
    from ...run.command import DEFAULT_TIMEOUT, Command

    if command is not None and shell is not None:
        raise InputError("Both --exec and --exec-shell were given.", "Use one of them.", code="exec")
    line = command if command is not None else shell
    if line is None:
        if timeout is not None:
            raise InputError("--exec-timeout needs an engine of yours.", "Give its command with --exec.", code="exec")
        return {"command": None}
    return {"command": Command(line, shell=shell is not None, timeout=timeout or default or DEFAULT_TIMEOUT)}
