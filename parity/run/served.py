"""A server that a command line starts for one model after another; it is waited for, and ended with its children."""

import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from ..interruptions import held_back
from .command import MODEL, PORT, TIMED_OUT, Command, EngineError, Tail, end

_HOST = "127.0.0.1"
_PAUSE = 0.05  # seconds between two attempts to reach it


class ServedModel:
    """The server of one model at a time, started when its URL is asked for. `command` knows {model} and {port}."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._model: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._tail: Tail | None = None
        self._url = ""

    @property
    def timeout(self) -> float:
        """Seconds that the server may take to start, and to answer."""
        return self._command.timeout

    def url(self, model: Path) -> str:
        """The URL at which the model is served, by the running server if it is this model's.

        Raises:
            EngineError: the server cannot be started, ends, or does not listen within the command's time limit.
        """
        if model != self._model or self._process is None or self._process.poll() is not None:
            self.stop()
            self._start(model)
        return self._url

    def ended(self) -> EngineError | None:
        """The error with which the server ended; None while it runs."""
        if self._process is None or self._tail is None or (status := self._process.poll()) is None:
            return None
        if status:
            return self._command.failed(status, self._tail.text())
        return EngineError(f"{self._command.name} ended with exit code 0 while it was needed.", "A server must keep running.")

    def stop(self) -> None:
        """End the server and its children."""
        if self._process is not None:
            end(self._process)
        self._model = self._process = self._tail = None

    def _start(self, model: Path) -> None:
        port = _free_port()
        arguments, environment = self._command.filled({MODEL: str(model), PORT: str(port)})
        try:
            with held_back():
                self._process = self._command.start(arguments, environment, subprocess.DEVNULL)
                self._tail = Tail(self._process)
            self._model, self._url = model, f"http://{_HOST}:{port}"
            self._wait(port)
        except BaseException:
            self.stop()
            raise

    def _wait(self, port: int) -> None:
        deadline = monotonic() + self._command.timeout
        while not _listens(port):
            if (error := self.ended()) is not None:
                raise error
            if monotonic() > deadline:
                raise EngineError(
                    f"{self._command.name} did not listen on its port within {self._command.timeout:g} seconds.",
                    f"It must listen on {_HOST}:{PORT}; --exec-timeout gives it more time.",
                    how=TIMED_OUT,
                )
            sleep(_PAUSE)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection((_HOST, port), 0.5):
        return True
    return False
