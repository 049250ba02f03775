"""What somebody sees who waits: a bar on stderr where that is a terminal, and nothing anywhere else."""

import os
import pty
import subprocess
import sys
from pathlib import Path

LINES = "".join(f'{{"checkpoint":"blk.{n}.l_out","token_idx":0,"values":[{n}.5,2,3]}}\n' for n in range(3))


def test_a_command_without_known_length_says_what_it_does(tmp_path: Path) -> None:
    """`convert` shows a bar with the file's name on a terminal, takes it away at the end, and shows none in a pipe."""
    dump = tmp_path / "theirs.jsonl"
    dump.write_text(LINES)
    command = [sys.executable, "-P", "-m", "parity", "convert", str(dump), "-o", str(tmp_path / "out.jsonl")]
    terminal, end = pty.openpty()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, env=os.environ | {"TERM": "xterm"}, check=True)
    os.close(end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert done.stdout == b""
    assert "reading theirs.jsonl" in shown
    assert shown.rindex("\x1b[2K") > shown.rindex("reading theirs.jsonl")  # erased
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "reading" not in piped.stderr
