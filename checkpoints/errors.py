"""Errors that a user can act on. Every other exception is a bug of ours."""

# Codes of what this machine has no room for, whatever the request: an output that cannot be written, too little disk or memory.
OUTPUT, DISK, MEMORY = "output", "disk", "memory"


class ParityError(Exception):
    """One clear line, what to do about it, and the exit code.

    `code` is a short stable word for machines (`--format json`), `message` says what is wrong,
    `advice` what to do; the command line prints "parity: message advice" and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, message: str, advice: str = "", *, code: str = "input") -> None:
        super().__init__(f"{message} {advice}".strip())
        self.message = message
        self.advice = advice
        self.code = code


class InputError(ParityError):
    """The input or the request is wrong (exit 2)."""


class ModelError(InputError):
    """The model file cannot be used as asked (exit 2)."""

    def __init__(self, message: str, advice: str = "", *, code: str = "model") -> None:
        super().__init__(message, advice, code=code)


class DumpError(InputError):
    """A dump cannot be read or used as asked (exit 2)."""

    def __init__(self, message: str, advice: str = "", *, code: str = "dump") -> None:
        super().__init__(message, advice, code=code)


class ReferenceFailed(ParityError):
    """llama.cpp refused the request or crashed on it (exit 2: the model or the request is at fault)."""

    def __init__(self, message: str, advice: str = "", *, code: str = "reference") -> None:
        super().__init__(message, advice, code=code)
