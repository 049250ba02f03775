"""The child process as its parent handles it: it is started, ended, and asked for its last words.

This module imports little, so that a command can start the child first and import the rest while the child imports llama.cpp.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from .builds import Build

# Patterns for a child that died; compiled only then, since it takes 10 ms.
_LAST_WORDS = r"(GGML_ASSERT\(.*|GGML_ABORT.*|what\(\):.*|.*\bterminate called\b.*|.*[Oo]ut of memory.*|.*Error: .*)"
_FOLDERS = r"^\S*/(?=[\w.-]+:\d+: )"  # of the source file that ggml names, on the machine that built it
# The folder of this package is put first on the child's path, unless it is on the path anyway.
_BOOT = "import sys; root = sys.argv[1]; sys.path[:0] = [] if root in sys.path else [root]; from reference.worker import main; main()"

_ENVIRONMENT = {
    "GGML_NO_BACKTRACE": "1",  # ggml would start a debugger to print one when it aborts
    # Threads that wait for each other in a busy loop starve where another program shares the cores: the same dump took
    # 13.5 s instead of 1.0 s. GNU's OpenMP counts spins, LLVM's milliseconds.
    "GOMP_SPINCOUNT": "1000",
    "KMP_BLOCKTIME": "0",
}


class Child:
    """A running worker: process, pipe, and the file that its stderr goes to. `build` is another llama.cpp than the installed one."""

    def __init__(self, verbose: bool, build: Build | None = None) -> None:
        our_end, child_end = Pipe()
        self.connection: Connection = our_end
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        root = str(Path(__file__).resolve().parent.parent)
        log = os.dup(2) if verbose else -1
        passed = [child_end.fileno(), *([log] if verbose else [])]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, root, str(child_end.fileno()), str(log)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.stderr,
                pass_fds=passed,
                env=_ENVIRONMENT | os.environ | (build.environment() if build is not None else {}),
            )
        finally:
            child_end.close()
            if verbose:
                os.close(log)

    def last_words(self) -> str:
        """What it printed on stderr before it ended: ggml's assertion, an exception, else the last line."""
        self.stderr.seek(0)
        text = self.stderr.read()[-65536:].decode(errors="replace")
        if match := re.search(_LAST_WORDS, text):
            return match[1].strip()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return re.sub(_FOLDERS, "", lines[-1]) if lines else ""

    def end(self, *, kill: bool) -> int:
        """Close the pipe and wait for the process; returns its exit status."""
        with contextlib.suppress(OSError):
            self.connection.close()
        if kill:
            self.process.kill()
        try:
            status = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it is computing, and would notice the closed pipe only afterwards
            self.process.kill()
            status = self.process.wait()
        return status


def finish(children: list[Child]) -> None:
    """End all children, and wait for them."""
    while children:
        child = children.pop()
        child.end(kill=True)
        child.stderr.close()
