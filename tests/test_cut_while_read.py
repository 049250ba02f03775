"""Files that shrink while they are memory-mapped: one line that names them, where the system would end the process without a word."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import one_line

from parity.lost_pages import _sentence

# parity, with this function called in place of `{place}` of the module `{module}`; it cuts the file before it goes on.
SCRIPT = """
import os, sys
import {module} as module
from parity.__main__ import main

owner, _, name = "{place}".rpartition(".")
owner = getattr(module, owner) if owner else module
original = getattr(owner, name)
shrinking = sys.argv.pop(1)

def cut(*arguments, **options):
    os.truncate(shrinking, 4096)
    return original(*arguments, **options)

setattr(owner, name, cut)
main()
"""


def cut_within(module: str, place: str, file: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run parity with a file that is cut to one page when it comes to `place`."""
    script = SCRIPT.format(module=module, place=place)
    arguments = [sys.executable, "-P", "-c", script, str(file), *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_arrays_and_models_that_shrink_are_named(stories: Path, tmp_path: Path) -> None:
    """A dump's arrays, as text and as JSON, and a model: exit 2 and what was cut short."""
    dump, model = tmp_path / "a.jsonl", tmp_path / "model.gguf"
    words = [
        sys.executable,
        "-P",
        "-m",
        "parity",
        "dump",
        "ours",
        "--tokens",
        "1,2",
        "--slice",
        "2048",
        "--binary",
        "-o",
        str(dump),
    ]
    subprocess.run(words, check=True, capture_output=True)
    arrays = dump.with_suffix(".columns.safetensors")
    whole = arrays.read_bytes()
    ran = cut_within("checkpoints.formats.columns", "_Arrays.rows", arrays, "lint", dump)
    assert (ran.returncode, ran.stdout) == (2, "")
    one_line(ran.stderr, f"{arrays} was cut short while it was being read.")
    arrays.write_bytes(whole)
    ran = cut_within("checkpoints.formats.columns", "_Arrays.rows", arrays, "diff", dump, dump, "--format", "json")
    assert (ran.returncode, ran.stderr) == (2, "")
    assert json.loads(ran.stdout)["error"]["message"] == f"{arrays} was cut short while it was being read."
    model.write_bytes(stories.read_bytes())
    ran = cut_within("engine.weights.gguf_model", "GgufModel.raw", model, "weights", "--model", model)
    assert (ran.returncode, ran.stdout) == (2, "")
    one_line(ran.stderr, f"{model} was cut short while it was being read.")


THREADS = """
import mmap, os, sys, threading, time
from parity.lost_pages import on_lost_pages

def end(message):
    print(message, flush=True)
    time.sleep(0.3)
    return 2

kept = on_lost_pages(end)
with open(sys.argv[1], "rb") as file:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.truncate(sys.argv[1], 0)
threads = [threading.Thread(target=lambda: data[0]) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_several_threads_that_read_a_lost_page_end_in_one_message(tmp_path: Path) -> None:
    """The second one waits while the first one writes."""
    file = tmp_path / "file"
    file.write_bytes(bytes(mmap.PAGESIZE))
    ran = subprocess.run([sys.executable, "-P", "-c", THREADS, file], capture_output=True, text=True, timeout=300, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, f"{file} was cut short while it was being read.\n", "")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are listed on Linux only")
def test_a_mapped_device_is_not_called_cut_short() -> None:
    """It has no size: a GPU's driver maps such ones."""
    device = os.open("/dev/zero", os.O_RDWR)
    with mmap.mmap(device, mmap.PAGESIZE, mmap.MAP_PRIVATE):
        assert "/dev/zero" in Path("/proc/self/maps").read_text(encoding="utf-8")
        assert "/dev/" not in _sentence()
    os.close(device)
