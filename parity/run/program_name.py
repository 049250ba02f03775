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

    `env NAME=value CMD`, `cd FOLDER && CMD` and `timeout 60 ./CMD` run CMD. `python -m MODULE` runs MODULE, `uv run python engine.py`
    runs engine.py.
    """
    words = _engine(words)
    program = Path(words[0]).name
    if _LAUNCHER.fullmatch(program):
        started = next((i for i, word in enumerate(words) if i and _is_program(word)), None)
        return program if started is None else program_name(words[started:])
    if not _INTERPRETER.fullmatch(program):
        return program
    for i, word in enumerate(words[1:], 1):
        if _SCRIPT.fullmatch(word):
            return Path(word).name
        if word == "-m" and i + 1 < len(words):
            return words[i + 1]  # what follows are the module's own words, which may name a script, too
        if word == "-c":
            break
    return program


def _is_program(word: str) -> bool:
    """Whether a launcher's word can be what it starts: a script, an interpreter, or a path."""
    return bool(_SCRIPT.fullmatch(word) or _INTERPRETER.fullmatch(Path(word).name) or re.fullmatch(r"[^-{][^={]*/[^={]+", word))


def _engine(words: Sequence[str]) -> Sequence[str]:
    """The words from the engine's on."""
    while len(words) > 1:
        if words[0] in _BEFORE:
            end = next((i for i, word in enumerate(words) if word in _ENDS or word.endswith(";")), len(words) - 1)
            if end == len(words) - 1:
                break
            words = words[end + 1 :]
        elif Path(words[0]).name == "env":
            words = _after_options(words[1:]) or words[:1]
        elif words[0] in _ENDS or _ASSIGNMENT.fullmatch(words[0]):
            words = words[1:]
        else:
            break
    return words


def _after_options(words: Sequence[str]) -> Sequence[str]:
    """The words behind env's own options, some of which have a word of their own."""
    while words and words[0].startswith("-"):
        words = words[2 if words[0] in ("-u", "--unset", "-C", "--chdir") else 1 :]
    return words
