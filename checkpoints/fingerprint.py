"""A model file's name tag: distinguishes models without reading all of them. `checkpoints.content` reads every byte."""

import hashlib
import os
from pathlib import Path

_HEAD = 1 << 20  # bytes from the start: the metadata of a GGUF, or most of them if the vocabulary is large
_SAMPLES = 256  # blocks taken at even distances from the rest, so that a file of any size takes an instant
_BLOCK = 4096  # bytes of a block: a page


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 (32 hex digits of it) of the file's size, its first MiB, 256 blocks spread evenly, and its end.

    Two files that differ only between the sampled blocks have the same fingerprint; `content_hash` distinguishes them.

    Raises:
        OSError: the file cannot be read.
    """
    size = Path(path).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with Path(path).open("rb") as file:
        digest.update(file.read(_HEAD))
        span = max(size - _HEAD - _BLOCK, 0)
        for index in range(_SAMPLES + 1):
            file.seek(_HEAD + span * index // _SAMPLES)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]
