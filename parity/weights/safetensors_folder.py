"""A Hugging Face model's folder: config.json and the tensors of its safetensors files, a few rows at a time."""

import re
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct, convert

from checkpoints.errors import InputError
from checkpoints.given_json import decoded
from checkpoints.printable import first_names
from checkpoints.regular import LFS_POINTER, read_text, require_regular

from .folder_quantisation import refusal, unpacked
from .stored import Stored

_TYPES: dict[str, Any] = {
    "F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.uint16, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
    "F8_E8M0": np.uint8, "U8": np.uint8, "I8": np.int8, "I32": np.int32, "I64": np.int64,
}  # fmt: skip
_BUFFERS = {"BOOL", "I16", "U16", "U32", "U64"}
_ID = re.compile(r"[0-9]{1,18}")  # int() takes other digits, too, and no text of thousands
_LARGEST_HEADER = 100_000_000  # bytes: what the format's own reader allows


class _Entry(Struct, frozen=True):
    """What a header says of a tensor: offsets count from the end of the header."""

    dtype: str
    shape: tuple[Annotated[int, Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


class Folder:
    """The model in a folder that `save_pretrained` wrote.

    Raises:
        InputError: config.json or safetensors files are missing, or a file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files = sorted(path.glob("*.safetensors"))
        try:
            config = decoded(read_text(path / "config.json"))
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:100]
            raise InputError(
                f"cannot read {path / 'config.json'}: {reason}.", "Use a folder that save_pretrained wrote."
            ) from error
        if not isinstance(config, dict):
            raise InputError(f"{path / 'config.json'} is no JSON object.", "Use a folder that save_pretrained wrote.")
        if not files:
            raise InputError(f"{path} contains no safetensors file.", "Use a folder that save_pretrained wrote.")
        self._require_whole(files)
        # Models that also see or hear have the language model's numbers in a separate part.
        inner = config.get("text_config")
        self.config: dict[str, Any] = {**config, **inner} if isinstance(inner, dict) else config
        if not self.config.get("quantization_config"):
            self.config = self.config | _of_modelopt(path)
        stored: dict[str, Stored] = {}
        self.unread: dict[str, str] = {}  # types by the name of a tensor that has one which is not known here
        for file in files:
            stored.update(_stored(file, self.unread))
        self.tensors = unpacked(stored, self.config)
        self.refusal = refusal(self.config)

    def _require_whole(self, files: list[Path]) -> None:
        """Refuse a folder that lacks a file which its index lists."""
        listed = _json(self.path / "model.safetensors.index.json").get("weight_map")
        wanted = {name for name in listed.values() if isinstance(name, str)} if isinstance(listed, dict) else set()
        lacking = sorted(wanted - {file.name for file in files})
        if lacking:
            raise InputError(f"{self.path} lacks {first_names(lacking)}, which its index lists.", "Download the folder again.")

    def special(self, short: str) -> frozenset[int]:
        """The ids that config.json, generation_config.json and the tokenizer's files give for its "bos" or "eos" token."""
        special_ids: set[int] = set()
        files = [self.config, *(_json(self.path / name) for name in ("generation_config.json", "tokenizer_config.json"))]
        texts: list[Any] = []  # of damaged files anything
        for content in files:
            ids = content.get(f"{short}_token_id")
            special_ids |= {number for number in (ids if isinstance(ids, list) else [ids]) if isinstance(number, int)}
            token = content.get(f"{short}_token")
            texts.append(token.get("content") if isinstance(token, dict) else token)
        added = _json(self.path / "tokenizer.json").get("added_tokens")
        entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
        decoder = files[-1].get("added_tokens_decoder")
        if isinstance(decoder, dict):
            numbered = {key: entry for key, entry in decoder.items() if isinstance(entry, dict) and _ID.fullmatch(key)}
            entries += [entry | {"id": int(key)} for key, entry in numbered.items()]
        special_ids |= {entry["id"] for entry in entries if entry.get("content") in texts and isinstance(entry.get("id"), int)}
        return frozenset(special_ids)

    def number(self, *names: str) -> int | None:
        """The first of these entries of config.json that is a whole number."""
        values = (self.config.get(name) for name in names)
        return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _of_modelopt(path: Path) -> dict[str, Any]:
    """A quantization_config that names the producer in hf_quant_config.json: modelopt writes that file, at first it alone."""
    producer = _json(path / "hf_quant_config.json").get("producer")
    name = producer.get("name") if isinstance(producer, dict) else None
    return {"quantization_config": {"quant_method": name.lower()}} if isinstance(name, str) else {}


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    try:
        content = decoded(read_text(file))
    except (OSError, ValueError, InputError):
        return {}
    return content if isinstance(content, dict) else {}


def _entry(name: str, described: Any) -> _Entry:
    try:
        return convert(described, _Entry)
    except ValueError as error:
        raise ValueError(f"its header is damaged at {name}: {error}") from error


def _stored(file: Path, unread: dict[str, str]) -> dict[str, Stored]:
    """The tensors of a file; those of types that no weight has are left out, those of unknown types are noted in `unread`.

    Raises:
        InputError: the file cannot be read, or its header is damaged.
    """
    try:
        require_regular(file)
        data = np.memmap(file, dtype=np.uint8, mode="r")
        if data[: len(LFS_POINTER)].tobytes() == LFS_POINTER:
            raise InputError(f"{file} is a Git LFS pointer, not the weights.", "Fetch them: git lfs pull.")
        size = int.from_bytes(data[:8].tobytes(), "little")
        if not 2 <= size <= min(len(data) - 8, _LARGEST_HEADER):
            raise ValueError("the header's length is wrong")  # noqa: TRY301  # reported with the other kinds of damage, below
        header = convert(decoded(data[8 : 8 + size].tobytes().decode()), dict[str, Any])
        header.pop("__metadata__", None)
        stored = {}
        for name, described in header.items():
            entry = _entry(name, described)
            if entry.dtype in _BUFFERS:
                continue
            if entry.dtype not in _TYPES:
                unread[name] = entry.dtype
                continue
            kind = _TYPES[entry.dtype]
            begin, end = entry.data_offsets
            if not 0 <= begin <= end <= len(data) - 8 - size or end - begin != np.dtype(kind).itemsize * prod(entry.shape):
                raise ValueError(f"{name} is not where the header says")  # noqa: TRY301
            raw = data[8 + size + begin : 8 + size + end]
            stored[name] = Stored(raw.view(kind).reshape(entry.shape), entry.dtype)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:100]
        raise InputError(f"cannot read {file}: {reason}.", "Download it again.") from error
    return stored
