"""The child process in which llama.cpp runs: it reads requests from a pipe, answers them, and ends with its parent.

An answer is any number of ("item", value) and ("note", sentence for the user), then ("done", value), ("error", class, message,
advice, code) or ("bug", traceback). Its stderr is a file of the parent's, which catches ggml's last words before an abort.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from checkpoints import errors

from .builds import LIBRARY_VARIABLE


class Stopped(Exception):
    """The parent wants no more items of this answer."""


def _watch(parent: int) -> None:
    """End this process when the parent is gone; the pipe shows that only while nothing is being computed."""
    while True:
        time.sleep(0.5)
        if os.getppid() != parent:
            os._exit(1)


def serve(connection: Connection, verbose_fd: int | None) -> None:
    """Answer requests (name, arguments, keywords) until the parent closes the pipe."""
    failure: tuple[Any, ...] | None = None
    service: Any = None
    try:
        from .service import Service

        service = Service(verbose_fd)  # loads llama.cpp while the parent does its own work
    except errors.ParityError as error:
        failure = _failed(error)
    except (ImportError, OSError, RuntimeError) as error:  # the bindings raise the last where the library does not load
        message = f"llama-cpp-python cannot be loaded: {error}."
        advice = (
            "All libraries of a build belong into one folder: libllama, libggml, libggml-base and libggml-cpu."
            if os.environ.get(LIBRARY_VARIABLE)
            else "Install it: pip install llama-cpp-python."
        )
        failure = _failed(errors.ReferenceFailed(message, advice, code="install"))

    def item(value: Any) -> None:
        if connection.poll():
            connection.recv()
            raise Stopped
        connection.send(("item", value))

    while True:
        try:
            name, arguments, keywords = connection.recv()
        except (EOFError, OSError):
            return
        if name == "stop":  # it arrived after the answer was complete
            continue
        answer = failure or _answer(getattr(service, name), arguments, keywords, item)
        while service is not None and service.notes:
            connection.send(("note", service.notes.pop(0)))
        connection.send(answer)


def _failed(error: errors.ParityError) -> tuple[Any, ...]:
    return ("error", type(error).__name__, error.message, error.advice, error.code)


def _answer(
    method: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any], item: Callable[[Any], None]
) -> tuple[Any, ...]:
    try:
        return ("done", method(*arguments, item=item, **keywords))
    except Stopped:
        return ("done", None)
    except errors.ParityError as error:
        return _failed(error)
    except MemoryError:
        return ("error", "ReferenceFailed", "there is not enough memory.", "Free memory, or use --window 1.", "memory")
    except OSError as error:  # such as a file that vanished, or a full disk
        problem = f"{error.filename or 'a file'}: {error.strerror or error}."
        return ("error", "InputError", problem, "Check space and permissions.", "system")
    except Exception:
        return ("bug", traceback.format_exc())


def main() -> None:
    """Entry point of the child: `<pipe fd> <verbose fd or -1>`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.dup2(2, 1)  # a library that prints must not reach the parent's stdout
    connection = Connection(int(sys.argv[-2]))
    verbose_fd = int(sys.argv[-1])
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    serve(connection, None if verbose_fd < 0 else verbose_fd)
    os._exit(0)  # no destructors of libraries: nothing is left to save


if __name__ == "__main__":
    main()
