"""The entry of the command line: every way to end, mapped to the exit codes of the design.

0 parity (or clean), 1 divergence (or findings), 2 the input or the request is wrong, 3 an internal error,
130 interrupted. Nothing but a divergence exits 1.
"""

import json
import os
import sys
from itertools import pairwise

from checkpoints.errors import ParityError

INTERRUPTED = 130
INTERNAL = 3
UNTESTABLE = 125  # git bisect's own


# NumPy's OpenBLAS lets its threads spin for 2^26 cycles after each product, beside llama.cpp's threads on the same cores: `parity run`
# took 0.84 s with it and 0.68 s with 2^20 (0.4 ms at 2.5 GHz, median of nine on two cores). It is read when NumPy is imported.
_SPIN = ("OPENBLAS_THREAD_TIMEOUT", "20")


def main() -> None:
    """Run a command and leave with its exit code."""
    os.environ.setdefault(*_SPIN)
    sys.exit(for_bisect(sys.argv[1:], run(sys.argv[1:])))


def for_bisect(arguments: list[str], code: int) -> int:
    """The exit code as `git bisect run` reads it where --bisect is given: 2 and 3 would be "bad" to it, 125 skips a commit."""
    return UNTESTABLE if "--bisect" in arguments and code in (2, INTERNAL) else code


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors are printed as one line, or as JSON if that was asked for."""
    import typer

    from .cli import app

    try:
        code = app(arguments, standalone_mode=False, prog_name="parity")
        sys.stdout.flush()
    except ParityError as error:
        return _fail(arguments, error.exit_code, error.code, error.message, error.advice)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        # The reader of our output went away (`parity … | head`); Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail(
            arguments, 2, "memory", "there is not enough memory.", "Take fewer --points or --positions, or a smaller model."
        )
    except Exception as error:
        # typer's own errors: its copy of click's classes, which it does not export.
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        if (said := getattr(error, "format_message", None)) is not None:
            return _fail(arguments, 2, "usage", said().rstrip("."), "", end=". `parity --help` lists the commands.")
        if os.environ.get("PARITY_TRACEBACK"):
            raise
        message = f"internal error, please report it: {type(error).__name__}: {error}"
        return _fail(arguments, INTERNAL, "internal", message, "PARITY_TRACEBACK=1 shows where.")
    if code == INTERRUPTED:  # typer's own handling of Ctrl-C
        return _interrupted()
    return code if isinstance(code, int) else 0


def _interrupted() -> int:
    print("parity: interrupted", file=sys.stderr)
    return INTERRUPTED


def _fail(arguments: list[str], exit_code: int, code: str, message: str, advice: str, *, end: str = "") -> int:
    line = " ".join(f"{message}{end} {advice}".split())
    if _wants_json(arguments):
        error = {"code": code, "message": " ".join(f"{message}{end}".split()), "advice": advice}
        print(json.dumps({"schema": 1, "error": error}))
    else:
        print(f"parity: {line}", file=sys.stderr)
    return exit_code


def _wants_json(arguments: list[str]) -> bool:
    pairs = pairwise(arguments)
    return "--format=json" in arguments or any(pair == ("--format", "json") for pair in pairs)


if __name__ == "__main__":
    main()
