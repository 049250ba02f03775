"""A Hugging Face model's folder: config.json and the tensors of its safetensors files, a few rows at a time."""

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.errors import InputError
from checkpoints.given_json import decoded
from checkpoints.regular import read_text, require_regular

Floats = NDArray[np.float32]
_TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.uint16}
_UNREAD = frozenset(("F8_E4M3", "F8_E5M2", "U8", "I8", "I32"))  # weights with scales of their own
_LARGEST_HEADER = 100_000_000  # bytes: what the format's own reader allows


class Stored(Struct, frozen=True):
    """One tensor as a view of a memory map, in PyTorch's order, and the numbers by which a converter multiplies it, one after the other.

    bfloat16 is kept as its bits, uint16. Of types of 8 bits and of packed integers only the shape is known.
    """

    array: NDArray[Any]
    factors: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the view."""
        return self.array.shape

    @property
    def readable(self) -> bool:
        """Whether its values are known."""
        return self.array.dtype in (np.float32, np.float16, np.float64, np.uint16)

    def part(self, index: Any = ...) -> Floats:
        """`tensor[index]` as float32; only its bytes are read."""
        taken = self.array[index]
        if taken.dtype == np.uint16:
            taken = (taken.astype(np.uint32) << np.uint32(16)).view(np.float32)
        values = np.asarray(taken, dtype=np.float32)
        for factor in self.factors:
            values = values * np.float32(factor)
        return values


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
            raise InputError(f"cannot read {path / 'config.json'}.", "Take a folder that save_pretrained wrote.") from error
        if not files or not isinstance(config, dict):
            raise InputError(f"{path} contains no safetensors file.", "Take a folder that save_pretrained wrote.")
        # Models that also see or hear have the language model's numbers in a separate part.
        inner = config.get("text_config")
        self.config: dict[str, Any] = {**config, **inner} if isinstance(inner, dict) else config
        self.tensors: dict[str, Stored] = {}
        for file in files:
            self.tensors.update(_stored(file))

    def special(self, short: str) -> frozenset[int]:
        """The ids that config.json, generation_config.json and the tokenizer's files give for its "bos" or "eos" token."""
        special_ids: set[int] = set()
        files = [self.config, *(_json(self.path / name) for name in ("generation_config.json", "tokenizer_config.json"))]
        texts = set()
        for content in files:
            ids = content.get(f"{short}_token_id")
            special_ids |= {number for number in (ids if isinstance(ids, list) else [ids]) if isinstance(number, int)}
            token = content.get(f"{short}_token")
            texts.add(token.get("content") if isinstance(token, dict) else token)
        added = _json(self.path / "tokenizer.json").get("added_tokens")
        entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
        decoder = files[-1].get("added_tokens_decoder")
        if isinstance(decoder, dict):
            entries += [
                entry | {"id": int(key)} for key, entry in decoder.items() if isinstance(entry, dict) and key.isdecimal()
            ]
        special_ids |= {entry["id"] for entry in entries if entry.get("content") in texts and isinstance(entry.get("id"), int)}
        return frozenset(special_ids)

    def number(self, *names: str) -> int | None:
        """The first of these entries of config.json that is a whole number."""
        values = (self.config.get(name) for name in names)
        return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    try:
        content = decoded(read_text(file))
    except (OSError, ValueError, InputError):
        return {}
    return content if isinstance(content, dict) else {}


def _stored(file: Path) -> dict[str, Stored]:
    try:
        require_regular(file)
        data = np.memmap(file, dtype=np.uint8, mode="r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        if not 2 <= size <= min(len(data) - 8, _LARGEST_HEADER):
            raise ValueError("the header's length is wrong")  # noqa: TRY301  # reported with the other kinds of damage, below
        header = json.loads(data[8 : 8 + size].tobytes())
        stored = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape, dtype = tuple(map(int, entry["shape"])), str(entry["dtype"])
            if dtype not in _TYPES and dtype not in _UNREAD:
                continue  # buffers
            kind: Any = _TYPES.get(dtype, np.int32 if dtype == "I32" else np.uint8)
            width = np.dtype(kind).itemsize
            if not 0 <= begin <= end <= len(data) - 8 - size or end - begin != width * prod(shape):
                raise ValueError(f"{name} is not where the header says")  # noqa: TRY301
            raw = data[8 + size + begin : 8 + size + end]
            stored[name] = Stored(raw.view(kind).reshape(shape))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"cannot read {file}: {' '.join(str(error).split())[:100]}.", "Download it again.") from error
    return stored
