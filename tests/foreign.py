"""Engines of other people: one in C, compiled for a test, and one in NumPy."""

import subprocess
import sys
from pathlib import Path

from parity import emit

NUMPY_ENGINE = Path(__file__).with_name("foreign_engine.py")


def numpy_engine(*options: str) -> str:
    """tests/foreign_engine.py as a line for --exec, with {points} and the placeholders in the options."""
    return " ".join([sys.executable, str(NUMPY_ENGINE), "{model} {sequences} {out} --points={points}", *options])


def compile_engine(folder: Path, *flags: str) -> Path:
    """tests/foreign_engine.c as a program in `folder`: MODEL 1,2,3 OUT [FAULT [POINTS]]."""
    (folder / "parity_dump.h").write_text(emit.source("c"))
    source, program = Path(__file__).with_name("foreign_engine.c"), folder / "engine"
    command = [
        "gcc",
        "-std=c99",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pedantic",
        *flags,
        "-I",
        folder,
        source,
        "-o",
        program,
    ]
    subprocess.run([*command, "-lm", "-lpthread"], check=True)
    return program
