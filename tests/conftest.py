"""Models and the reference, made once for all tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parity import default_model
from reference.client import Reference


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Twins made by tests lie in a folder of their own: no test reads what another program cached."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARITY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def stories() -> Path:
    """The embedded model: qwen2, 24 layers, Q8_0."""
    return default_model.path()


@pytest.fixture(scope="session")
def reference(_own_cache: None) -> Iterator[Reference]:
    """One llama.cpp child process for all tests that don't kill it."""
    with Reference() as client:
        yield client


@pytest.fixture(scope="session")
def quantized(reference: Reference, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives the stories model in another type, made by llama.cpp once."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(kind: str) -> Path:
        path = folder / f"stories-{kind}.gguf"
        if not path.exists():
            reference.quantize(stories, kind, path)
        return path

    return make
