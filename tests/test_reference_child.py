"""llama.cpp's child process: it answers after a broken request, is replaced when it dies, and never outlives its parent."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import comes_true, ended

from checkpoints.errors import ReferenceFailed
from reference.client import Reference
from reference.jobs import NATIVE

MODEL = Path(__file__).parent.parent / "parity" / "models" / "stories-14m-q8_0.gguf"
TEXT = "Once upon a time there was a"


@pytest.fixture(scope="module")
def tokens(reference: Reference) -> tuple[int, ...]:
    """The prompt's ids."""
    return reference.tokenize(MODEL, TEXT).ids


def test_versions(reference: Reference) -> None:
    """The versions name llama-cpp-python and the backend that computes."""
    versions = reference.versions()
    assert versions["llama_cpp_python"]
    assert versions["backend"] == "CPU"


def test_abandoned_capture(reference: Reference, tokens: tuple[int, ...]) -> None:
    """A capture that is left halfway is stopped, and the next request is answered by the same child."""
    pid = reference.pid
    for _ in reference.capture(MODEL, tokens):
        break
    assert reference.tokenize(MODEL, "a").ids
    assert reference.pid == pid


def test_request_within_a_capture(reference: Reference, tokens: tuple[int, ...]) -> None:
    """A request while a capture is still being read is an error, not a deadlock; both go on afterwards."""
    items = reference.capture(MODEL, tokens, "embd,logits")
    next(items)
    with pytest.raises(RuntimeError, match="a capture is being read"):
        reference.tokenize(MODEL, "a")
    assert [node.point for node, _ in items] == ["logits"]
    assert reference.tokenize(MODEL, "a").ids


def test_parent_stays_light() -> None:
    """Importing the reference loads neither llama.cpp nor gguf into the parent."""
    code = "import sys, reference; print([m for m in ('llama_cpp', 'gguf', 'pandas') if m in sys.modules])"
    root = str(MODEL.parent.parent.parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_aborted_child_is_an_error() -> None:
    """A child that aborts in the midst of a request becomes ReferenceFailed, and the next request starts another."""
    with Reference() as handle:
        ids = handle.tokenize(MODEL, TEXT).ids
        items = handle.capture(MODEL, ids * 30, None, NATIVE)
        next(items)
        assert handle.pid is not None
        os.kill(handle.pid, signal.SIGABRT)
        with pytest.raises(ReferenceFailed, match=r"llama\.cpp aborted while computing"):
            list(items)
        assert handle.tokenize(MODEL, TEXT).ids == ids


def test_child_is_gone_after_close() -> None:
    """Closing ends the child; closing twice is no error; a request that runs elsewhere ends as well."""
    handle = Reference()
    handle.versions()
    pid = handle.pid
    assert pid is not None
    handle.close()
    handle.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_child_dies_with_its_parent() -> None:
    """A parent that is killed leaves no child behind."""
    code = "import time; from reference.client import Reference; r = Reference(); r.versions(); print(r.pid, flush=True); time.sleep(600)"
    root = str(MODEL.parent.parent.parent)
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert comes_true(lambda: ended(pid))


def test_the_bindings_are_loaded_without_the_package() -> None:
    """llama.cpp is there without chat templates and caches; who imports the package afterwards gets it whole, on the same library."""
    code = (
        "import sys; from reference.bindings import bindings; api = bindings(); print('jinja2' in sys.modules, 'llama_cpp' in sys.modules);"
        "import llama_cpp; print(llama_cpp.Llama.__name__, llama_cpp.llama_cpp is api, bindings() is api, bool(api.llama_backend_init))"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert outcome.split() == ["False", "False", "Llama", "True", "True", "True"]
