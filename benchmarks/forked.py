"""Commands of parity in processes that are forked from one that has imported everything: no command waits for imports.

llama.cpp's process is forked, too, instead of being started by name. What a command does is the same in all else: it has
processes of its own, and no state of an earlier command.
"""

import contextlib
import importlib
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

_PACKAGES = ("checkpoints", "engine", "reference", "reports", "parity")
_LIBRARIES = ("gguf", "llama_cpp", "pandas", "rich.console", "rich.table", "jinja2", "safetensors.numpy", "orjson")
_INTERNAL = 3  # `parity.__main__`'s exit code of an uncaught exception


class ForkedProcess:
    """llama.cpp's process as `reference.child.Child` uses a Popen; the command's end is its end."""

    def __init__(self, arguments: list[str], *, stderr: IO[bytes], env: dict[str, str], **_: Any) -> None:
        self._status: int | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(env)
            os.dup2(stderr.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            sys.argv = arguments
            _serve(parent)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self._status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if done else None
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired."""
        until = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("llama.cpp", timeout or 0.0)
            time.sleep(0.002)
        return status

    def kill(self) -> None:
        """End it, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _serve(parent: int) -> None:
    """What the process of llama.cpp does (`reference.worker.main`), in a fork."""
    from multiprocessing.connection import Connection

    from reference.worker import serve

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        serve(Connection(int(sys.argv[-2])), None)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def warm() -> None:
    """Import all that any command imports, and make commands fork llama.cpp's process."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for package in _PACKAGES:
        root = importlib.import_module(package)
        for module in pkgutil.walk_packages(root.__path__, f"{package}."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):  # CuPy's part, where there is no CuPy
                    importlib.import_module(module.name)
    for name in _LIBRARIES:
        importlib.import_module(name)
    from reference import child

    child.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=ForkedProcess, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )


def command(arguments: list[str], cache: Path, seconds: float) -> tuple[int, str]:
    """Exit code and stderr of a command, after `warm`; -signal where one ended it.

    Raises:
        TimeoutError: it took longer; it and what it started are killed.
    """
    with tempfile.TemporaryFile() as stderr:
        pid = os.fork()
        if pid == 0:
            _run(arguments, cache, stderr)
        until = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > until:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise TimeoutError
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # llama.cpp's process, if it is still there
        stderr.seek(0)
        return os.waitstatus_to_exitcode(status), stderr.read().decode("utf-8", "replace")


def _run(arguments: list[str], cache: Path, stderr: IO[bytes]) -> None:
    code = _INTERNAL
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(stderr.fileno(), 2)
        os.environ["PARITY_CACHE"] = str(cache)
        sys.argv = ["parity", *arguments]
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        from parity.__main__ import run

        code = run(arguments)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else _INTERNAL
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)
