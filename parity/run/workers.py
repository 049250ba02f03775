"""Where cells run: processes of this machine, or the workers of a Dask cluster."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import Pipe, get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Event, Thread, main_thread
from time import sleep
from typing import ParamSpec, TypeVar

from checkpoints.errors import InputError
from checkpoints.room import cores

from ..interruptions import held_back

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MEMORY = 1 << 30  # bytes a worker may take: llama.cpp, NumPy and a tiny model, 0.3 GB measured
_MOST = 16
_GRACE = 3.0  # seconds in which a worker's main thread ends its engine and removes its files
_PATIENCE = "10s"  # how long to wait for a scheduler to answer, and to come back


def fitting() -> int:
    """The number of workers for which this machine has cores and memory."""
    free = cores()
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    room = pages * os.sysconf("SC_PAGE_SIZE") // _MEMORY if pages else free
    return max(1, min(free, room, _MOST))


@contextmanager
def workers_of(count: int, cluster: str = "") -> Iterator[Executor]:
    """Workers; when the block is left early, work that has not begun is dropped, and work that has is ended.

    Raises:
        InputError: there is no such cluster, its connection is lost, or Dask is not installed.
    """
    if cluster:
        with _cluster(cluster) as pool:
            yield pool
        return
    listening, telling = Pipe(duplex=False)
    pool = _Processes(count, mp_context=get_context("spawn"), initializer=_begin, initargs=(listening,))
    try:
        yield pool
    except BaseException:
        telling.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        telling.close()
        listening.close()


class _Processes(ProcessPoolExecutor):
    """Ctrl-C reaches all processes of a terminal: the main one ends the others, which would print tracebacks, even while they start.

    A worker is started when work is submitted. An interruption waits until the pool knows it: the pool ends what it knows, and a
    worker that it does not know would look for the pool's semaphores when they are gone.
    """

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        with held_back(), _blocked():
            return super().submit(_work, fn, *args, **kwargs)


@contextmanager
def _blocked() -> Iterator[None]:
    """A block whose new processes begin with Ctrl-C blocked, which they inherit."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Set in a worker that is to end. A pool's process reports whatever its work raises, SystemExit too, and would take the next work.
_ENDING = Event()


def _work(fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    if hasattr(signal, "SIGUSR1"):  # before, there is nothing to end in order, and the signal kills
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))
    if _ENDING.is_set():
        sys.exit(1)
    return fn(*args, **kwargs)


def _begin(listening: Connection) -> None:
    """What a worker does first: it ignores Ctrl-C, and ends with the main process, or when that closes its end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    main = parent_process()
    if main is not None and hasattr(signal, "pthread_kill"):
        Thread(target=_end_after, args=(main.sentinel, listening), daemon=True).start()


def _end_after(main: int, listening: Connection) -> None:
    """Wait until the main process has ended or asks for an end, then end this one: if the main process was killed, nothing else would.

    A worker would wait for work for ever, and its engine would write into the dumps of the run that is started next. The signal
    interrupts the main thread, which ends its engine.
    """
    wait([main, listening])
    _ENDING.set()
    signal.pthread_kill(main_thread().ident or 0, signal.SIGUSR1)
    sleep(_GRACE)
    os._exit(1)


def _silence() -> None:
    """Silence Dask, so that a lost connection is reported once, in one line: each of its loggers has its own level and handlers."""
    for name in ("distributed", "tornado", "asyncio", *logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client
        from distributed.comm import CommClosedError
    except ImportError:
        raise InputError(
            "--cluster needs Dask, which is not installed.",
            "Install parity with its cluster extra: pip install '.[cluster]'.",
            code="cluster",
        ) from None
    _silence()
    try:
        client = Client(address, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError, CommClosedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"there is no Dask scheduler at {address}: {reason}.", "Check --cluster tcp://host:port.", code="cluster"
        ) from error
    pool: Executor = client.get_executor(pure=False, retries=2)
    try:
        yield pool
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("distributed", "asyncio", "concurrent", "tornado"):
            raise InputError(
                f"the connection to the cluster at {address} was lost ({type(error).__name__}); finished cells are kept.",
                "Run the same command again to continue.",
                code="cluster",
            ) from error
        raise
    finally:
        pool.shutdown(wait=False)
        with suppress(TimeoutError):  # a busy machine's client closes later; what it has computed is not lost for that
            client.close(timeout=2)
