"""Requests to end (Ctrl-C, `timeout`, a cancelled CI job), raised as KeyboardInterrupt where it cannot get lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from types import FrameType

_LATER = 0.02  # seconds: NumPy's longest extension module takes a few hundredths to initialise


def end_as_interrupted() -> None:
    """Treat a request to end like Ctrl-C: engines are stopped, files stay whole."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, _interrupt)
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        # `nohup` ignores SIGHUP, and its children inherit that.
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)


@contextmanager
def held_back() -> Iterator[None]:
    """A block that no request to end interrupts. The interrupt is raised after it, when the code that must end what the block began
    knows of it.

    For a few milliseconds only. Other threads than the main one are never interrupted.
    """
    came: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in filter(None, (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))):
            if callable(signal.getsignal(number)):  # who ignores it does so here as well
                handlers[number] = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; later, if an extension module is being initialised, since Cython's modules clear whatever is raised then."""
    if hasattr(signal, "setitimer") and _initialises_extension(frame):
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, _LATER)
        return
    raise KeyboardInterrupt


def _initialises_extension(frame: FrameType | None) -> bool:
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False
