"""What somebody sees who waits: a bar on stderr where that is a terminal, and nothing anywhere else."""

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

LINES = "".join(f'{{"checkpoint":"blk.{n}.l_out","token_idx":0,"values":[{n}.5,2,3]}}\n' for n in range(3))


def everything(terminal: int) -> bytes:
    """What is written to a terminal until its last writer ends; a slow machine's bars are more than one reading gives."""
    shown = b""
    with os.fdopen(terminal, "rb", buffering=0) as file, contextlib.suppress(OSError):  # so does Linux tell the end
        while piece := file.read(1 << 16):
            shown += piece
    return shown


def test_a_command_without_known_length_says_what_it_does(tmp_path: Path) -> None:
    """`convert` shows a bar with the file's name on a terminal, takes it away at the end, and shows none in a pipe."""
    dump = tmp_path / "theirs.jsonl"
    dump.write_text(LINES)
    command = [sys.executable, "-P", "-m", "parity", "convert", str(dump), "-o", str(tmp_path / "out.jsonl")]
    terminal, end = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, env=os.environ | {"TERM": "xterm"}) as process:
        os.close(end)
        shown = everything(terminal).decode()
        assert process.communicate()[0] == b""
    assert process.returncode == 0
    assert "reading theirs.jsonl" in shown
    assert shown.rindex("\x1b[2K") > shown.rindex("reading theirs.jsonl")  # erased
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "reading" not in piped.stderr
