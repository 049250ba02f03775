"""Hugging Face as a side: one emitted file, run by an interpreter that has torch and transformers."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec import Struct

from checkpoints.errors import InputError
from checkpoints.whole_file import Replacement, unwritable

from ..emit import source
from .command import DEFAULT_TIMEOUT, Command
from .request import Progress, Prompt

_DUMP = "hf.jsonl"
_COPIED = 1 << 24  # bytes that are copied at once
_ROOM = "Set TMPDIR to a folder that has room."
ADVICE = "pip install torch transformers gguf accelerate there, or name an interpreter that has them with --python."


class Tokenizer(Struct, frozen=True):
    """The ids that transformers' own tokenizer gives a prompt; `problem` says why there are none."""

    ids: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    problem: str = ""

    def difference(self, prompt: Prompt) -> str:
        """A sentence on the first position at which llama.cpp tokenizes the text differently; empty if there is none."""
        if self.problem:
            return f"transformers has no tokenizer for this model: {self.problem}"
        for place, (llama_id, own_id) in enumerate(zip(prompt.ids, self.ids, strict=False)):
            if llama_id != own_id:
                pieces = (*prompt.pieces, *[""] * len(prompt.ids))
                return (
                    f"the tokenizers differ at position {place}: llama.cpp has {llama_id} {pieces[place]!r}, "
                    f"Hugging Face {own_id} {self.pieces[place]!r}; both sides were given llama.cpp's ids"
                )
        if len(self.ids) != len(prompt.ids):
            return (
                f"the tokenizers differ in length: llama.cpp makes {len(prompt.ids)} tokens, Hugging Face {len(self.ids)}; "
                "both sides were given llama.cpp's ids"
            )
        return ""


class HuggingFace(Struct, frozen=True):
    """transformers' model, float32, eager attention.

    `model` is a GGUF file, which transformers dequantises itself, or a folder with config.json and safetensors. `points` are
    names with commas, or "" for all known ones; `positions` is "all", "last" or numbers with commas.
    """

    model: Path
    python: str = "python3"
    device: str = "cpu"
    points: str = ""
    slice_size: int | None = 16
    timeout: float = DEFAULT_TIMEOUT
    positions: str = "all"
    name: str = "Hugging Face"

    def check(self, prompt: Prompt | None = None) -> None:
        """Raise InputError if the interpreter does not exist, or has no torch or transformers."""
        probe = "import importlib.util as u; print([m for m in ('torch', 'transformers') if u.find_spec(m) is None])"
        try:
            done = subprocess.run([self.python, "-P", "-c", probe], capture_output=True, text=True, check=False, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or "it did not answer within 60 seconds"
            raise InputError(f"cannot run {self.python}: {reason}.", "Check --python.", code="python") from error
        if done.returncode or not done.stdout.startswith("["):
            raise InputError(f"{self.python} is not Python 3.11 or newer.", "Check --python.", code="python")
        if done.stdout.strip() != "[]":
            lacking = done.stdout.strip(" []\n").replace("'", "")
            raise InputError(f"{self.python} has no {lacking}.", f"Run: {ADVICE}", code="python")

    def versions(self) -> str:
        """The versions of torch and transformers in that interpreter, as text. Raises InputError, as `check` does."""
        self.check()
        probe = "import importlib.metadata as m; print(*map(m.version, ('torch', 'transformers')))"
        return subprocess.run([self.python, "-P", "-c", probe], capture_output=True, text=True, check=False, timeout=60).stdout

    def dump(self, prompt: Prompt, out: Path, progress: Progress | None = None) -> Tokenizer:
        """Compute the prompt, and the tokens that it is led along, in one pass, and write `out`, completely or not at all.

        Returns:
            The ids that transformers' own tokenizer gives the prompt's text.

        Raises:
            EngineError: transformers cannot load the model, or fails.
            InputError: `out`, or the folder for temporary files, cannot be written.
        """
        if progress is not None:
            progress(self.name, 0, None)
        try:
            with Replacement(out) as replacement, self._scratch() as scratch:
                tokenizer = self._computed(prompt, scratch)
                with (scratch / _DUMP).open("rb") as dump, replacement.temporary.open("wb") as file:
                    shutil.copyfileobj(dump, file, _COPIED)
                return tokenizer
        except OSError as error:
            raise unwritable(out, error, "Choose another --out.") from error

    @staticmethod
    @contextmanager
    def _scratch() -> Iterator[Path]:
        """A folder for the script, the prompt and the dump as it grows. Raises InputError if it cannot be made."""
        try:
            folder = TemporaryDirectory(prefix="parity-hf-")
        except OSError as error:
            raise unwritable(error.filename or "temporary files", error, _ROOM) from error
        with folder as scratch:
            yield Path(scratch)

    def _computed(self, prompt: Prompt, scratch: Path) -> Tokenizer:
        """Let transformers compute a prompt and write its dump into a folder."""
        script, tokenizer_note = scratch / "parity_hf.py", scratch / "tokenizer.json"
        _write(script, source("hf"))
        words = [
            self.python,
            str(script),
            "{model}",
            "--out",
            "{out}",
            "--device",
            self.device,
            "--tokenizer",
            str(tokenizer_note),
        ]
        words += ["--slice", str(self.slice_size or 0)]
        if prompt.ids:
            words += ["--tokens", "{tokens}"]
        if prompt.text is not None:  # in a file: it may contain {placeholders} or NUL, or be longer than a command line can be
            text = scratch / "prompt.txt"
            _write(text, prompt.text)
            words += ["--prompt-file", str(text)]
        if self.points:
            words += ["--points", "{points}"]
        if self.positions != "all":
            words += ["--positions", self.positions]
        ids = (*prompt.ids, *prompt.generated)
        Command(shlex.join(words), timeout=self.timeout).run(
            model=self.model, tokens=ids, out=scratch / _DUMP, points=self.points
        )
        return Tokenizer(**json.loads(tokenizer_note.read_text(encoding="utf-8"))) if tokenizer_note.exists() else Tokenizer()


def _write(path: Path, text: str) -> None:
    """Write a temporary file. Raises InputError if it cannot be written."""
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise unwritable(path, error, _ROOM) from error
