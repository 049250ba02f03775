"""Models and the reference, made once for all tests."""

import os
import time

# Where the suite runs in several processes each takes one core; must stand before NumPy is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli import Cli
from hypothesis import HealthCheck, settings
from servers import Start, started

from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine.synth import shape_like, synthesize
from engine.synth.recipe import Value, shape_of
from engine.synth.recipes import recipe
from parity.__main__ import run
from parity.models import embedded as default_model
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob

if TYPE_CHECKING:
    from planted import Faulty

# Examples that take long to make, or to test, are the machine's matter: it may be busy. They are the same in every run, or the suite
# would be a matter of chance; `benchmarks/fuzz.py` looks for others.
settings.register_profile("any machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Twins made by tests lie in a folder of their own: no test reads what another program cached.

    Where no bytecode is to be written beside the sources it lies in another folder, or each of the hundreds of programs that tests
    start would compile what it imports: llama.cpp's process takes twice as long to start then.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARITY_CACHE", str(tmp_path_factory.mktemp("cache")))
        if os.environ.get("PYTHONDONTWRITEBYTECODE"):
            patch.delenv("PYTHONDONTWRITEBYTECODE")
            patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.getbasetemp().parent / "bytecode"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_time() -> Iterator[None]:
    """The seconds that `parity explain` may search are those of this process: what other programs compute meanwhile ends no search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parity.explain.budget.perf_counter", time.process_time)
        yield


@pytest.fixture(scope="session")
def stories() -> Path:
    """The embedded model: qwen2, 24 layers, Q8_0."""
    return default_model.path()


@pytest.fixture(scope="session")
def stories_run(_own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one `parity run` of the embedded model, five tokens, default points."""
    folder = tmp_path_factory.mktemp("stories-run") / "whole"
    assert run(["run", "--prompt", "Once upon a time", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def faulty(stories: Path) -> "Faulty":
    """The embedded model, into which faults are planted."""
    from planted import Faulty

    return Faulty(stories)


@pytest.fixture(scope="session")
def right(faulty: "Faulty") -> Dump:
    """A right engine: every point, whole rows of `planted.TOKENS`."""
    from planted import TOKENS, Planted

    return faulty.dump(Planted(()), TOKENS, points="all", size=4096, bare=False)


@pytest.fixture(scope="session")
def reference(_own_cache: None) -> Iterator[Reference]:
    """One llama.cpp child process for all tests that don't kill it."""
    with Reference() as client:
        yield client


@pytest.fixture(scope="session")
def ref(reference: Reference, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    """llama.cpp on the tokens of `right`, every point."""
    from planted import TOKENS

    out = tmp_path_factory.mktemp("ref") / "ref.jsonl"
    reference.dump(DumpJob(stories, out, TOKENS, points="all"))
    return read(out)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> "Faulty":
    """A small qwen2 with groups of 7 query heads, into which faults are planted."""
    from explaining import small_engine

    return small_engine(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def c_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine in C, compiled: qwen2 and llama, F32 weights only."""
    from foreign import compile_engine

    return compile_engine(tmp_path_factory.mktemp("engine-in-c"))


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


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A function that starts a real completion server: serve("llama_cpp", model, fault)."""
    if not (python := os.environ.get("PARITY_SERVER_PYTHON")):
        pytest.skip("PARITY_SERVER_PYTHON names no interpreter that has completion servers")
    yield from started(python, tmp_path_factory.mktemp("servers"))


@pytest.fixture(scope="session")
def without_bos(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stories model with `add_bos_token` off: a server of it forgets the BOS, and computes everything else alike."""
    data = bytearray(stories.read_bytes())
    key = b"tokenizer.ggml.add_bos_token"
    place = data.index(key) + len(key) + 4  # the value's type is a u32
    assert data[place] == 1
    data[place] = 0
    path = tmp_path_factory.mktemp("without-bos") / "model.gguf"
    path.write_bytes(data)
    return path


@pytest.fixture
def parity(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`parity …` in this process, in an empty folder: parity("run", "--prompt", "hi") has code, out and err."""
    monkeypatch.chdir(tmp_path)
    return Cli(capfd)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Callable[..., Path]:
    """A function that makes a model of any shape: synthetic("tiny-llama", layers=5, kind="q8_0")."""
    folder = tmp_path_factory.mktemp("synthetic")

    def make(like: str = "tiny", kind: str = "f32", **shape: object) -> Path:
        name = "-".join([like, kind, *(f"{key}{value}" for key, value in sorted(shape.items()))])
        path = folder / f"{name}.gguf"
        if not path.exists():
            synthesize(path, shape_like(like, **shape), weight_type=kind, tokenizer=stories)
        return path

    return make


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Callable[..., Path]:
    """A function that makes a small model by its recipe: small_model("gemma3", kind="q8_0", layers=3)."""
    folder = tmp_path_factory.mktemp("small-models")

    def make(name: str, kind: str | None = None, settings: dict[str, Value] | None = None, **shape: object) -> Path:
        words = [f"{key}={value}" for key, value in sorted({**shape, **(settings or {})}.items())]
        path = folder / f"{'-'.join([name, str(kind), *words])}.gguf"
        if not path.exists():
            chosen = recipe(name)
            make_by_recipe(path, chosen, shape_of(chosen, **shape), settings or {}, kind=kind, tokenizer=stories)
        return path

    return make


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps were computed: the clock of `explain`'s budgets, so that an answer is the same on any machine."""
    from explaining import count_steps

    return count_steps(monkeypatch)


@pytest.fixture
def step_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand computed steps are a second of any budget, those inside `diff` and `explain` too: no answer depends on the machine."""
    from explaining import count_steps

    count_steps(monkeypatch, per_second=1000)
