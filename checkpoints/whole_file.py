"""Files that are there as a whole or not at all: what stood there before is lost only to something complete."""

from pathlib import Path

from .errors import InputError


def put(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there. A link, a pipe or a device is written to as it is.

    Raises:
        InputError: it cannot be written; what stood there is as it was.
    """
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name[:200]}.partial")  # names end at 255 bytes
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}.", "Choose another path.", code="output") from error
