"""The embedded default model."""

from pathlib import Path

NAME = "stories-14m-q8_0.gguf"


def path() -> Path:
    """The stories model that ships inside the package; MODEL_CARD.md beside it says what it is."""
    return Path(__file__).with_name(NAME)
