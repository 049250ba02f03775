"""A foreign engine's command line: how it is started, watched and stopped, and what its errors say."""

import errno
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import IO

from msgspec import Struct

from checkpoints.errors import InputError
from checkpoints.printable import printable
from checkpoints.whole_file import is_special, unwritable

from ..interruptions import held_back
from .program_name import program_name

CRASHED, REFUSED, TIMED_OUT, UNUSABLE, NOT_STARTED = "crashed", "refused", "timed out", "unusable", "not started"
MODEL, TOKENS, OUT, POINTS, PORTIONS = "{model}", "{tokens}", "{out}", "{points}", "{portions}"
SEQUENCES, STATE, UBATCH, PORT = "{sequences}", "{state}", "{ubatch}", "{port}"
DEFAULT_TIMEOUT = 3600.0  # seconds: a CPU engine may take minutes for a long prompt, but should not block CI for a night
_TAIL = 1 << 16  # bytes of stderr that are kept: its last lines say what went wrong
LARGEST_DUMP = 16 << 30  # bytes; a whole dump of 24 layers × 500 positions × 4,096 values in text is under 1 GB
_WATCH = 0.05  # seconds between two checks of the clock and of the dump
_SHOWN = 200  # characters of a program's path
_GRACE = 1.0  # seconds that reading the rest of stderr's pipe may take once the engine has ended
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_NOT_EXECUTABLE, _NOT_THERE = 126, 127  # exit codes of env and of shells (POSIX) for a program that cannot be run, or found
# A shell reports a program that was ended by a signal as 128 + its number: ILL, TRAP, ABRT, BUS, FPE, KILL, SEGV, TERM.
_ENDED_BY_SIGNAL = frozenset(128 + number for number in (4, 5, 6, 7, 8, 9, 11, 15))
# What runtimes print when a program ends because of an error of its own, not because it refuses its input.
_UNHANDLED = ("Traceback (most recent call last)", "panicked at", "terminate called", "Segmentation fault", "AddressSanitizer")


class EngineError(InputError):
    """A foreign engine did not write a dump; `how` is CRASHED, REFUSED, TIMED_OUT, UNUSABLE or NOT_STARTED."""

    def __init__(self, message: str, advice: str = "", *, how: str = UNUSABLE) -> None:
        super().__init__(message, advice, code="exec")
        self.how = how


class Command(Struct, frozen=True):
    """A foreign engine as `--exec` or `--exec-shell` describes it.

    `line` may contain {model}, {tokens} (ids with commas), {sequences} (several prompts, with semicolons), {out}, {points},
    {portions}, {ubatch} and {state}. Without `shell` it is split as a shell would, but started without one, so that paths need no
    quotes; leading NAME=value words are set in its environment. `timeout` is in seconds; `variables` are set in its environment, too.
    `largest_dump`: bytes of a dump after which the engine is stopped.

    Raises:
        InputError: the line is empty, its quotes don't match, or the time limit is not a positive number.
    """

    line: str
    shell: bool = False
    timeout: float = DEFAULT_TIMEOUT
    variables: tuple[tuple[str, str], ...] = ()
    largest_dump: int = LARGEST_DUMP

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise InputError("--exec-timeout must be a positive number of seconds.", code="exec")
        _, program = self._split()
        if not program:
            raise InputError(
                f"{self.option} is empty.", f"Write e.g. {self.option} 'my-engine {{model}} {{tokens}} {{out}}'.", code="exec"
            )

    @property
    def option(self) -> str:
        """The option with which it was given."""
        return "--exec-shell" if self.shell else "--exec"

    def _split(self) -> tuple[dict[str, str], list[str]]:
        try:
            words = shlex.split(self.line, comments=False)
        except ValueError as error:
            raise InputError(f"cannot read {self.option} {self.line!r}: {error}.", "Check its quotes.", code="exec") from error
        count = 0
        while count < len(words) and _ASSIGNMENT.fullmatch(words[count]):
            count += 1
        return dict(word.split("=", 1) for word in words[:count]), words[count:]

    @property
    def name(self) -> str:
        """The engine's name, as messages use it."""
        return program_name(self._split()[1])

    def takes(self, placeholder: str) -> bool:
        """Whether the line contains this placeholder."""
        return placeholder in self.line

    @property
    def ways(self) -> frozenset[str]:
        """The placeholders in the line that say how a prompt is to be computed."""
        return frozenset(filter(self.takes, (PORTIONS, UBATCH, SEQUENCES, STATE)))

    def check(self) -> None:
        """Look for the program before anything is computed for it; a shell line, or a program in a placeholder, is only seen in the run.

        Raises:
            EngineError: there is no such program, or it is not executable.
        """
        environment, program = self._split()
        if self.shell or "{" in program[0]:
            return
        path = (os.environ | environment | dict(self.variables)).get("PATH")
        if shutil.which(program[0], path=path) is None:
            raise EngineError(
                f"cannot run {shlex.quote(program[0])[:_SHOWN]}: it is not there, or not executable.",
                f"Check {self.option}.",
                how=NOT_STARTED,
            )

    def run(
        self,
        *,
        model: Path,
        tokens: Sequence[int],
        out: Path,
        points: str = "default",
        portions: Sequence[int] = (),
        sequences: Sequence[Sequence[int]] = (),
        ubatch: int | None = None,
        state: Path | None = None,
    ) -> None:
        """Start the engine and wait until it has written `out`; without {out} in the line its stdout is the dump.

        Args:
            portions: the number of tokens of each forward pass; if empty, one pass takes all (of the longest of several prompts).
            sequences: prompts that are computed together; if empty, `tokens` alone.
            ubatch: the most tokens that are to be computed at once; None for all.
            state: the file from which the engine continues if it exists, and in which it leaves its state; None for none.

        Raises:
            EngineError: the program does not exist, failed, took too long, wrote too much, or left no dump.
        """
        values = {
            MODEL: str(model),
            TOKENS: ",".join(map(str, tokens)),
            OUT: str(out),
            POINTS: points,
            PORTIONS: ",".join(map(str, portions or (max(map(len, sequences or (tokens,))),))),
            SEQUENCES: ";".join(",".join(map(str, ids)) for ids in sequences or (tokens,)),
            UBATCH: str(ubatch or sum(map(len, sequences or (tokens,)))),
            STATE: "" if state is None else str(state),
        }
        arguments, environment = self.filled(values)
        try:
            _remove(out)
            stdout = None if self.takes(OUT) else out.open("wb")
        except OSError as error:
            raise unwritable(out, error) from error
        process = None
        try:
            with held_back():
                process = self.start(arguments, environment, subprocess.DEVNULL if stdout is None else stdout)
                tail = Tail(process)
            stopped = self._wait(process, out)
        except BaseException:
            if process is not None:
                end(process)
            raise
        finally:
            if stdout is not None:
                stdout.close()
        end(process)  # with the processes that it left behind, or every run would add some
        if stopped is not None:
            raise stopped
        if process.returncode:
            raise self.failed(process.returncode, tail.text())
        self._dumped(out)

    def filled(self, values: Mapping[str, str]) -> tuple[list[str] | str, dict[str, str]]:
        """The program with its arguments (one line, for a shell) and its variables, every placeholder replaced."""
        if self.shell:
            return _filled(self.line, {name: shlex.quote(value) for name, value in values.items()}), {}
        environment, program = self._split()
        return [_filled(word, values) for word in program], {
            name: _filled(value, values) for name, value in environment.items()
        }

    def start(
        self, arguments: list[str] | str, environment: Mapping[str, str], stdout: int | IO[bytes]
    ) -> "subprocess.Popen[bytes]":
        """Start it; its stderr is a pipe, for a `Tail`.

        Raises:
            EngineError: there is no such program, or it is not executable.
        """
        try:
            return subprocess.Popen(
                arguments,
                shell=self.shell,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                env=os.environ | environment | dict(self.variables),
                start_new_session=True,  # so that its children can be ended with it
            )
        except OSError as error:
            what = arguments[0] if isinstance(arguments, list) else "a shell"
            advice = f"Check {self.option}."
            if error.errno == errno.E2BIG:
                advice = "The token ids are more than a command line holds: use a shorter prompt."
            if error.errno == errno.ENOENT and Path(what).is_file():
                advice = _why_not_found(what)
            raise EngineError(f"cannot run {what}: {error.strerror}.", advice, how=NOT_STARTED) from error

    def _wait(self, process: "subprocess.Popen[bytes]", out: Path) -> EngineError | None:
        """Wait until the engine ends; returns the error for which it had to be stopped, if any."""
        deadline = monotonic() + self.timeout
        largest = min(self.largest_dump, shutil.disk_usage(out.parent).free // 2)
        pause = 0.002
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(pause)
                return None
            pause = min(2 * pause, _WATCH)
            if monotonic() > deadline:
                return EngineError(
                    f"{self.name} was stopped after {self.timeout:g} seconds.",
                    "Is it waiting for something? --exec-timeout gives it more time.",
                    how=TIMED_OUT,
                )
            with suppress(OSError):
                status = out.lstat()
                if not stat.S_ISREG(status.st_mode):
                    return self._no_file(out, status.st_mode)
                if status.st_size > largest:
                    return EngineError(
                        f"{self.name} was stopped after it had written {status.st_size / 2**30:.1f} GiB to its dump.",
                        "Write fewer points, or only the leading values of each row.",
                    )

    def _no_file(self, out: Path, mode: int) -> EngineError:
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        return EngineError(f"{self.name} turned {out} into {kind}.", "It must write a regular file to {out}.")

    def failed(self, status: int, stderr: str) -> EngineError:
        """The error for an exit code other than 0, with the end of stderr."""
        lines = [line for line in stderr.splitlines() if line.strip()]
        last_line = printable(lines[-1].strip()) if lines else "it printed nothing on stderr"
        if status in (_NOT_EXECUTABLE, _NOT_THERE):
            return EngineError(
                f"{self.name} could not be started (exit code {status}): {last_line.rstrip('.')}.",
                f"Check {self.option}: it names a program that is not there, or not executable.",
                how=NOT_STARTED,
            )
        killed = -status if status < 0 else status - 128 if status in _ENDED_BY_SIGNAL else 0
        how = f"was killed by {_signal(killed)}" if killed else f"failed with exit code {status}"
        crashed = bool(killed) or not lines or any(word in stderr for word in _UNHANDLED)
        return EngineError(
            f"{self.name} {how}: {last_line.rstrip('.')}.",
            "Run the command by itself to see why.",
            how=CRASHED if crashed else REFUSED,
        )

    def _dumped(self, out: Path) -> None:
        try:
            status = out.lstat()
        except OSError:
            raise EngineError(f"{self.name} exited with code 0 but did not write {out}.", "It must write to {out}.") from None
        if not stat.S_ISREG(status.st_mode):
            raise self._no_file(out, status.st_mode)


def _signal(number: int) -> str:
    """A signal by its name, or, where it has none (those for real-time use), by its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _filled(text: str, values: Mapping[str, str]) -> str:
    """The text with every placeholder replaced; placeholders inside the values are left alone."""
    return re.sub(
        r"\{(?:model|tokens|out|points|portions|sequences|ubatch|state|port)\}",
        lambda match: values.get(match[0], match[0]),
        text,
    )


def _why_not_found(program: str) -> str:
    """Why the system finds no program of this name, although there is a file of it."""
    if os.sep not in program:  # looked for in PATH, where this folder is not
        return f"The file is there, but not in PATH: write ./{program}."
    with suppress(OSError), Path(program).open("rb") as file:
        if file.read(2) != b"#!":
            return "The file is there; the loader that it names is not: it was built for another system."
    return "The file is there; the program that its first line names is not, or that line ends in a carriage return."


def _remove(out: Path) -> None:
    """Remove an earlier run's file, so that it is not taken for this run's dump. Pipes and devices stay."""
    if not is_special(out):
        out.unlink(missing_ok=True)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End an engine and the children in its process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Tail:
    """Reads a process's stderr to its end and keeps only the last bytes, so that it neither fills memory nor blocks the pipe."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stderr is not None
        self._stream = process.stderr
        self._kept = b""
        self._thread = threading.Thread(target=self._read, name="engine-stderr", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._stream as stream:
            while piece := os.read(stream.fileno(), _TAIL):
                self._kept = (self._kept + piece)[-_TAIL:]

    def text(self) -> str:
        """The last bytes as text. A child that keeps the pipe open is not waited for."""
        self._thread.join(_GRACE)
        return self._kept.decode("utf-8", "replace")
