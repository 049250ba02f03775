"""The command line's entry point, which maps every way to end to an exit code.

0 parity (or clean), 1 divergence (or findings), 2 the input or the request is wrong, 3 an internal error, 130 interrupted or
terminated (SIGTERM, SIGHUP), 141 if nobody read the answer to its end (`parity … | head`). Nothing but a divergence
exits 1, and nothing but parity 0.
"""

import io
import json
import os
import re
import sys
from itertools import pairwise
from typing import TextIO

from checkpoints.errors import ParityError
from checkpoints.printable import printable

from .interruptions import end_as_interrupted
from .lost_pages import on_lost_pages

INTERRUPTED = 130
UNREAD = 141  # what a shell shows of a program that wrote into a closed pipe: 128 + SIGPIPE
INTERNAL = 3
UNTESTABLE = 125  # git bisect's own
_WIDTH = re.compile(r"[1-9][0-9]{0,4}")  # columns of a terminal
_LONGEST_ERROR = 1500  # characters: enough for a list of names that may have been meant


# NumPy's OpenBLAS lets its threads spin for 2^26 cycles after each product, beside llama.cpp's threads on the same cores: `parity run`
# took 0.84 s with it and 0.68 s with 2^20 (0.4 ms at 2.5 GHz, median of nine on two cores). NumPy reads it on import.
_SPIN = ("OPENBLAS_THREAD_TIMEOUT", "20")


def main() -> None:
    """Run a command and leave with its exit code."""
    os.environ.setdefault(*_SPIN)
    end_as_interrupted()
    _prepare_output()
    kept = on_lost_pages(_lost_pages)  # noqa: F841 - the handler lives as long as it is named
    sys.exit(for_bisect(sys.argv[1:], run(sys.argv[1:])))


def _prepare_output() -> None:
    """A closed stdout or stderr becomes the null device; characters that the terminal's encoding lacks are printed as "?".

    A width that is none (COLUMNS=0 in some editors and containers) is not taken: nothing would be printed.
    """
    if not _WIDTH.fullmatch(os.environ.get("COLUMNS", "")):
        os.environ.pop("COLUMNS", None)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Under PYTHONUNBUFFERED nothing tells a text stream that a full disk took only a part of what it wrote.
        if isinstance(raw := sys.stdout.buffer, io.FileIO):
            sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), sys.stdout.encoding, line_buffering=True)
        sys.stdout.reconfigure(errors="replace")


def _lost_pages(message: str) -> int:
    arguments = sys.argv[1:]
    code = _fail(arguments, 2, "cut-short", message, "Run it again when nothing writes that file.")
    sys.stderr.flush()
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # the cursor, which a progress bar hides: nothing ends the bar here
    return for_bisect(arguments, code)


def for_bisect(arguments: list[str], code: int) -> int:
    """The exit code for `git bisect run` with `drift check --bisect`: 125 skips a commit, where 2 and 3 would mark it bad."""
    return UNTESTABLE if arguments[:1] == ["drift"] and "--bisect" in arguments and code in (2, INTERNAL) else code


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors are printed as one line, or as JSON if that was asked for."""
    try:
        from .commands.app import app  # half of a short command's time, so an interruption may well happen here

        code = app(arguments, standalone_mode=False, prog_name="parity")
        sys.stdout.flush()
    except ParityError as error:
        return _fail(arguments, error.exit_code, error.code, error.message, error.advice)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        return _unread()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer's own answer to it is 1
            return _unread()
        raise
    except MemoryError:
        return _fail(
            arguments,
            2,
            "memory",
            "there is not enough memory.",
            "Record fewer --points or --positions, or use a smaller model.",
        )
    except Exception as error:
        if (wrong_usage := _usage(arguments, error)) is not None:
            return wrong_usage
        if os.environ.get("PARITY_TRACEBACK"):
            raise
        if isinstance(error, OSError):
            return _system(arguments, error)
        shown = error.__cause__ if isinstance(error.__cause__, EOFError) else error
        message = f"internal error, please report it: {type(shown).__name__}: {shown}"
        return _fail(arguments, INTERNAL, "internal", message, "PARITY_TRACEBACK=1 shows where.")
    if code == INTERRUPTED:  # typer's own handling of Ctrl-C
        return _interrupted()
    return code if isinstance(code, int) else 0


def _usage(arguments: list[str], error: Exception) -> int | None:
    """The exit code of typer's own errors, None for others: they are its copies of click's classes, which it does not export."""
    if (
        type(error).__name__ == "Abort"
    ):  # typer's answer to an EOFError, too, such as that of a module whose bytecode is cut short
        return None if isinstance(error.__cause__, EOFError) else _interrupted()
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 2
    if (format_message := getattr(error, "format_message", None)) is None:
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "parity"
    return _fail(arguments, 2, "usage", format_message().rstrip("."), "", end=f". See `{command} --help`.")


def _system(arguments: list[str], error: OSError) -> int:
    subject = "the answer or a file cannot be written or read" if error.filename is None else str(error.filename)
    code = _fail(arguments, 2, "system", f"{subject}: {error.strerror or error}.", "Check space and permissions.")
    try:
        sys.stdout.flush()
    except OSError:  # the failed write was that of the answer itself
        _drop(sys.stdout)
    return code


def _drop(stream: TextIO) -> None:
    """Discard what is left in a stream's buffer: Python would report the error again on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(line: str) -> None:
    """One line on stderr. If it cannot be written, the exit code alone tells, which for an uncaught error would be 1."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def _unread() -> int:
    _drop(sys.stdout)
    return UNREAD


def _interrupted() -> int:
    # An interruption inside of exec(), by which dataclasses make their methods, is remembered by CPython (run_eval_code_obj) although it
    # was handled: `python -m` would end by SIGINT instead of with this exit code. The next exec() forgets it.
    exec("")
    _say("parity: interrupted")
    return INTERRUPTED


def _fail(arguments: list[str], exit_code: int, code: str, message: str, advice: str, *, end: str = "") -> int:
    line = " ".join(f"{message}{end} {advice}".split())
    if _wants_json(arguments):
        sentence = printable(" ".join(f"{message}{end}".split()), _LONGEST_ERROR)
        error = {"code": code, "message": sentence, "advice": printable(advice, _LONGEST_ERROR)}
        try:
            print(json.dumps({"schema": 1, "error": error}), flush=True)
        except OSError:
            _drop(sys.stdout)
        else:
            return exit_code
    _say(f"parity: {printable(line, _LONGEST_ERROR)}")
    return exit_code


def _wants_json(arguments: list[str]) -> bool:
    pairs = pairwise(arguments)
    return "--format=json" in arguments or any(pair == ("--format", "json") for pair in pairs)


if __name__ == "__main__":
    main()
