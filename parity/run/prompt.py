"""The prompt that options give: a text, a file's text or token ids."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from checkpoints.errors import InputError
from checkpoints.regular import read_text

_NUMBER = re.compile(r"[+-]?[0-9]{1,30}")  # int() takes other digits, too, underscores, and texts of thousands


def numbers(text: str, name: str) -> tuple[int, ...]:
    """A comma-separated list of whole numbers.

    Raises:
        InputError: it is not such a list; the message names the option.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(map(_NUMBER.fullmatch, parts)):
        raise InputError(f"{name} must be whole numbers separated by commas, not {text!r:.80}.", f"Write e.g. {name} 1,2,3.")
    return tuple(map(int, parts))


def given_prompt(text: str | None, file: Path | None, tokens: str | None) -> tuple[str | None, tuple[int, ...] | None]:
    """The prompt's text or its token ids: exactly one of the three options must be given.

    Raises:
        InputError: none or more than one is given, the file cannot be read, or the prompt is empty.
    """
    given: Sequence[object] = [value for value in (text, file, tokens) if value is not None]
    if len(given) != 1:
        problem = "no prompt was given" if not given else "more than one prompt was given"
        raise InputError(f"{problem}.", "Use one of --prompt, --prompt-file and --tokens.", code="prompt")
    if tokens is not None:
        ids = numbers(tokens, "--tokens")
        if not ids:
            raise InputError("--tokens is empty.", "Write e.g. --tokens 1,2,3.", code="prompt")
        return None, ids
    if file is not None:
        try:
            text = read_text(file)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(f"cannot read {file}: {reason}.", "Check --prompt-file.", code="prompt") from error
    if not text:
        raise InputError("the prompt is empty.", "Give at least one word.", code="prompt")
    try:
        # In a locale without UTF-8 the command line's bytes arrive as surrogates.
        return os.fsencode(text).decode("utf-8"), None
    except UnicodeError:
        raise InputError("the prompt is not UTF-8.", "Encode it as UTF-8, or give --prompt-file.", code="prompt") from None
