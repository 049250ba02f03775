"""What an engine is called in answers: the script where an interpreter runs one, else the program."""

import re
from collections.abc import Sequence
from pathlib import Path

_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_INTERPRETER = re.compile(r"(?:python|pypy|node|deno|bun|ruby|perl|lua|luajit|julia|Rscript|bash|dash|zsh|sh)[\d.]*")
_LAUNCHER = re.compile(
    r"uv|poetry|pipenv|hatch|torchrun|accelerate|mpirun|mpiexec|nice|ionice|taskset|numactl|stdbuf|timeout|time|nohup"
)
_SCRIPT = re.compile(r"[^{}]+\.(?:pyz?|m?js|ts|rb|pl|lua|jl|R|sh|bash)")
_BEFORE = frozenset(
    ("cd", "export", "source", ".", "set", "ulimit", "unset", "module")
)  # of a shell's line, in front of the engine
_ENDS = frozenset(("&&", ";", "||"))


def program_name(words: Sequence[str]) -> str:
    """The last part of the path of what a command line runs. `words` are the command's words, at least one.

    `env NAME=value CMD` and `cd FOLDER && CMD` run CMD. `python -m MODULE` runs MODULE, `uv run python engine.py` runs engine.py.
    """
    words = _engine(words)
    program = Path(words[0]).name
    interpreter = _INTERPRETER.fullmatch(program) is not None
    if not interpreter and not _LAUNCHER.fullmatch(program):
        return program
    for i, word in enumerate(words[1:], 1):
        if _SCRIPT.fullmatch(word):
            return Path(word).name
        if interpreter and word == "-m" and i + 1 < len(words):
            return words[i + 1]  # what follows are the module's own words, which may name a script, too
        if interpreter and word == "-c":
            break
    return program


def _engine(words: Sequence[str]) -> Sequence[str]:
    """The words from the engine's on."""
    while len(words) > 1:
        if words[0] in _BEFORE:
            end = next((i for i, word in enumerate(words) if word in _ENDS or word.endswith(";")), len(words) - 1)
            if end == len(words) - 1:
                break
            words = words[end + 1 :]
        elif Path(words[0]).name == "env" or _ASSIGNMENT.fullmatch(words[0]):
            words = words[1:]
        else:
            break
    return words
