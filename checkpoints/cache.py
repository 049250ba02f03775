"""Where parity keeps what takes long to compute: copies of models, and hashes of files."""

import os
from math import isfinite
from pathlib import Path

from .errors import InputError

_DEFAULT_GB = 20.0  # one F32 copy of a 4 B model, or all those of a test model


def cache_dir() -> Path:
    """$PARITY_CACHE, otherwise $XDG_CACHE_HOME/parity, otherwise ~/.cache/parity; it need not exist."""
    if given := os.environ.get("PARITY_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "parity"


def cache_limit() -> int:
    """How many bytes the F32 copies in the cache may take together: $PARITY_CACHE_GB, otherwise 20 GB.

    Raises:
        InputError: the variable is not a number of gigabytes.
    """
    text = os.environ.get("PARITY_CACHE_GB", "")
    try:
        gigabytes = float(text or _DEFAULT_GB)
    except ValueError:
        gigabytes = -1.0
    if not (isfinite(gigabytes) and gigabytes >= 0):
        raise InputError(
            f"PARITY_CACHE_GB is {text!r:.40}, which is not a number of gigabytes.",
            "Set it to a number such as 20, or unset it.",
            code="environment",
        )
    return int(gigabytes * 1e9)


def require_cache() -> Path:
    """The cache folder; it is created if necessary.

    Raises:
        InputError: it cannot be created or written to.
    """
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission")
    except OSError as error:
        raise InputError(
            f"cannot write to the cache {folder}: {error.strerror}.",
            "Set PARITY_CACHE to a writable folder.",
            code="cache",
        ) from error
    return folder
