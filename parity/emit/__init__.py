"""Files for users' engines: what runs in a user's process is one of these, never our packages."""

from pathlib import Path

_HERE = Path(__file__).parent
FILES = {"c": "parity_dump.h", "rust": "parity_dump.rs", "pytest": "golden_fixture.py"}


def source(language: str) -> str:
    """The text of the emitter for "c", "python" or "rust", of the driver of a Hugging Face model for "hf", of the fixture for "pytest"."""
    if language == "hf":
        from .python import hugging_face_file

        return hugging_face_file()
    if language == "python":
        from .python import single_file

        return single_file()
    return (_HERE / FILES[language]).read_text(encoding="utf-8")
