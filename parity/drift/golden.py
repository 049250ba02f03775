"""A folder of golden dumps: `drift.json`, which says how they were made, and one dump per prompt."""

import hashlib
import json
import os
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, convert
from msgspec.structs import replace

from checkpoints.errors import InputError, ModelError
from checkpoints.gguf_file import contents
from checkpoints.given_json import decoded
from checkpoints.points import resolve
from checkpoints.regular import read_text
from checkpoints.structs import as_dict
from checkpoints.whole_file import put

from ..models import embedded as default_model
from ..run.request import Prompt

FORMAT = 1
MANIFEST = "drift.json"
EMBEDDED = "embedded"


class GoldenPrompt(Struct, frozen=True):
    """One prompt, its token ids and those that were generated after it; `file` is its dump's name.

    `lacking` says what an engine that stopped early did not print of what it was asked for; empty if nothing.
    """

    text: str
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    generated: tuple[int, ...]
    generated_pieces: tuple[str, ...]
    file: str
    lacking: str = ""

    @property
    def prompt(self) -> Prompt:
        """The prompt in the form that sides take."""
        return Prompt(self.text, self.tokens, self.pieces, self.generated, self.generated_pieces)


class Golden(Struct, frozen=True):
    """How golden dumps were made: `source` is the side ("ours", "ref" or "exec"), `model` its path seen from the folder."""

    folder: Path
    source: Annotated[str, Meta(pattern="^(ours|ref|exec)$")]
    model: str
    fingerprint: str
    model_name: str
    mode: Annotated[str, Meta(pattern="^(exact|native)$")]
    points: str
    slice_size: Annotated[int, Meta(ge=1, le=1 << 31)]
    build: dict[str, Any]
    created: str
    prompts: tuple[GoldenPrompt, ...]
    updates: tuple[dict[str, Any], ...] = ()
    content: str = ""  # of the model file; recordings of parity 0.1 lack it

    def path(self, prompt: GoldenPrompt) -> Path:
        """Where a prompt's dump lies."""
        return self.folder / prompt.file

    @property
    def identity(self) -> str:
        """16 hex digits that change with any golden number: margins against other numbers do not belong to this history."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(self.path(prompt).read_bytes())
        return digest.hexdigest()[:16]

    def model_path(self, given: Path | None) -> Path:
        """The model file: the given one, else the recorded path.

        Raises:
            InputError: the file is missing, or is another model, whose differences would not be drift.
        """
        path = self.inputs(given)[-1]
        try:
            model = contents(path)
            changed = model.fingerprint != self.fingerprint or (self.content and model.content != self.content)
        except OSError as error:
            raise InputError(
                f"cannot read the model {path}: {error.strerror or error}.", "Say where it is with --model.", code="model"
            ) from error
        except ModelError as error:
            advice = "Say where it is with --model." if error.code == "no-file" else error.advice
            raise InputError(error.message, advice, code="model") from error
        if changed:
            raise InputError(
                f"the model changed, which is no drift: {path} is not the {self.model_name} of these golden dumps.",
                "Give that file with --model, or record the new one.",
                code="model-changed",
            )
        return path

    def inputs(self, given: Path | None) -> tuple[Path, ...]:
        """The files that a check reads: drift.json, the dumps, and the model (the given one, else the recorded one)."""
        model = given or (default_model.path() if self.model == EMBEDDED else self.folder / self.model)
        return self.folder / MANIFEST, *map(self.path, self.prompts), model

    def same_prompts(self, texts: tuple[str, ...]) -> None:
        """Raise InputError if these are not the recorded prompts, in any order."""
        recorded = [prompt.text for prompt in self.prompts]
        new = [text for text in texts if text not in recorded]
        gone = [text for text in recorded if text not in texts]
        if new or gone:
            changes = f"{len(new)} new, {len(gone)} gone; the first is {json.dumps((new or gone)[0][:60], ensure_ascii=False)}"
            raise InputError(
                f"the prompt set changed, which is no drift: {changes}.", "Record the new set.", code="prompts-changed"
            )

    def same_mode(self, mode: str | None) -> None:
        """Raise InputError if another mode is requested than was recorded."""
        if mode is not None and mode != self.mode:
            raise InputError(
                f"the mode changed, which is no drift: these golden dumps are of {self.mode} mode.",
                f"Check with --mode {self.mode}, or record again.",
                code="mode-changed",
            )

    def save(self) -> None:
        """Write `drift.json`."""
        facts = {"format": FORMAT} | {name: value for name, value in as_dict(self).items() if name != "folder"}
        put(self.folder / MANIFEST, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())


def load(folder: Path) -> Golden:
    """Read a folder's `drift.json`.

    Raises:
        InputError: the file is missing, has a newer format, or is damaged; or a dump is missing.
    """
    path = folder / MANIFEST
    try:
        facts = decoded(read_text(path))
        if not isinstance(facts, dict) or type(facts.get("format")) is not int:
            raise ValueError("it does not say its format")  # noqa: TRY301  # reported with the other kinds of damage, below
        if facts["format"] != FORMAT:
            raise InputError(f"{path} is of a newer format.", "Update parity.", code="golden")
        golden = convert({**facts, "folder": folder}, Golden, dec_hook=lambda kind, value: kind(value))
    except OSError as error:
        advice = "Make golden dumps with `parity drift record`."
        raise InputError(f"cannot read {path}: {error.strerror}.", advice, code="golden") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}.", "Restore it, or record again.", code="golden") from error
    for prompt in golden.prompts:
        if Path(prompt.file).name != prompt.file or not golden.path(prompt).is_file():
            raise InputError(
                f"the golden dump {golden.path(prompt)} is missing.", "Restore it, or record again.", code="golden"
            )
    return golden


def golden_prompt(prompt: Prompt, file: str) -> GoldenPrompt:
    """A prompt whose dump is `file`."""
    return GoldenPrompt(prompt.text or "", prompt.ids, prompt.pieces, prompt.generated, prompt.generated_pieces, file)


def seen_from(folder: Path, model: Path) -> str:
    """The model's path relative to the folder, so that a checkout may lie anywhere."""
    if model == default_model.path():
        return EMBEDDED
    place = model.parent.resolve() / model.name  # a link keeps its name, by which the other parts of a split model are found
    return Path(os.path.relpath(place, folder.resolve())).as_posix()


def read_prompts(path: Path) -> tuple[str, ...]:
    r"""One prompt per line, in which "\n" stands for a line break; empty lines are skipped.

    Raises:
        InputError: the file cannot be read, has no prompt, or has one twice.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"cannot read {path}: {reason}.", "Check --prompts.", code="prompts") from error
    prompts = tuple(line.replace("\\n", "\n") for line in lines if line.strip())
    if not prompts or len(set(prompts)) < len(prompts):
        problem = "holds no prompt" if not prompts else "holds a prompt twice"
        raise InputError(f"{path} {problem}.", "Write one prompt on each line.", code="prompts")
    return prompts


def rewrite(golden: Golden, prompt: GoldenPrompt, new: Path, points: Collection[str]) -> None:
    """Take the lines of `points` from another dump; every other line stays as it is, to the byte."""
    fresh = {key: line for line in new.read_bytes().splitlines(keepends=True) if (key := _key(line)) and key[0] in points}
    path = golden.path(prompt)
    lines = [fresh.get(key, line) if (key := _key(line)) else line for line in path.read_bytes().splitlines(keepends=True)]
    put(path, b"".join(lines))


def noted(golden: Golden, updated: tuple[tuple[int, str], ...], build: dict[str, Any]) -> Golden:
    """The same golden dumps with a note of what was rewritten, when and by which build."""
    note = {"time": now(), "points": [list(item) for item in updated], "build": build}
    return replace(golden, updates=(*golden.updates, note))


def now() -> str:
    """The current time as ledgers and manifests write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _key(line: bytes) -> tuple[str, int, int] | None:
    """(point, seq, position) of a record's line; None for any other line."""
    record = json.loads(line)
    if "checkpoint" not in record:
        return None
    return resolve(record["checkpoint"]), int(record.get("seq", 0)), int(record["token_idx"])
