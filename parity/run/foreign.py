"""A foreign engine as our side: its command line is run, and what it wrote is its dump."""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from checkpoints.errors import InputError


def run_command(template: str, *, model: Path, tokens: Sequence[int], out: Path) -> None:
    """Run `template` with {model}, {tokens} (ids with commas) and {out} filled in; without {out} its stdout is the dump.

    The command is split as a shell would, and started without one: no quoting of paths is needed.

    Raises:
        InputError: the template cannot be read, the program is not there, it failed, or it left no dump.
    """
    values = {"{model}": str(model), "{tokens}": ",".join(map(str, tokens)), "{out}": str(out)}
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise InputError(f"cannot read --exec {template!r}: {error}.", "Check its quotes.", code="exec") from error
    if not words:
        raise InputError("--exec is empty.", "Write e.g. --exec 'my-engine {model} {tokens} {out}'.", code="exec")
    command = []
    for word in words:
        filled = word
        for name, value in values.items():
            filled = filled.replace(name, value)
        command.append(filled)
    to_file = "{out}" in template
    try:
        out.unlink(missing_ok=True)  # what an earlier run left there is not this one's
        if to_file:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
            )
        else:
            with out.open("wb") as file:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE, check=False)
    except OSError as error:
        raise InputError(f"cannot run {command[0]}: {error.strerror}.", "Check --exec.", code="exec") from error
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it printed nothing"]
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"failed with exit code {done.returncode}"
        raise InputError(f"{command[0]} {how}: {last[0]}.", "Run the command by itself.", code="exec")
    if not out.exists():
        raise InputError(f"{command[0]} ended well but wrote no {out}.", "It must write to {out}.", code="exec")
