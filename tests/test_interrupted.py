"""What ends in the middle, by Ctrl-C, a kill or llama.cpp's death, leaves whole lines and says so."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import comes_true, ended

from checkpoints.reading.reader import read
from parity.__main__ import run
from parity.doctor import health


def stopped(out: Path, how: signal.Signals) -> tuple[int, str]:
    """A long `parity dump ours` that gets a signal while it writes: its exit code and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "parity", "dump", "ours", "--tokens", ",".join(["5"] * 400), "--points", "all", "-o", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would this child of it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - it only sets a signal
    )
    assert comes_true(lambda: out.exists() and out.stat().st_size > 100_000)
    process.send_signal(how)
    _, message = process.communicate(timeout=300)
    return process.returncode, message


@pytest.mark.slow
def test_ctrl_c_leaves_a_readable_dump_and_exits_130(tmp_path: Path) -> None:
    """A run that is interrupted exits 130 with one line and no traceback, and what it wrote is whole lines without an end."""
    assert stopped(tmp_path / "o.jsonl", signal.SIGINT) == (130, "parity: interrupted\n")
    dump = read(tmp_path / "o.jsonl")
    assert dump.end is None
    assert dump.records > 0


def test_a_killed_run_leaves_a_readable_dump(tmp_path: Path) -> None:
    """A run that is killed leaves every line it wrote."""
    assert stopped(tmp_path / "o.jsonl", signal.SIGKILL)[0] == -signal.SIGKILL
    assert read(tmp_path / "o.jsonl").records > 10


def test_an_engine_ends_with_a_run_that_is_told_to_end(tmp_path: Path) -> None:
    """SIGTERM, which `timeout` and cancelled CI jobs send, ends `run --exec` as Ctrl-C does, and the engine with it."""
    engine = tmp_path / "engine.py"
    engine.write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    command = f"{sys.executable} {engine} {{model}} {{tokens}} {{out}}"
    process = subprocess.Popen(
        [sys.executable, "-m", "parity", "run", "--tokens", "5", "--exec", command, "-o", str(tmp_path / "run")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    pid = tmp_path / "pid"
    assert comes_true(lambda: pid.exists() and pid.read_text() != "")
    process.terminate()
    _, message = process.communicate(timeout=300)
    assert (process.returncode, message) == (130, "parity: interrupted\n")
    assert comes_true(lambda: ended(int(pid.read_text())))


@pytest.mark.slow
def test_workers_and_their_engines_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    """After SIGKILL of `conform --workers 2` nothing waits for work for ever, and no engine writes into the next run's dumps."""
    engine = tmp_path / "engine.py"
    engine.write_text(
        "import os, pathlib, time\n"
        f"file = pathlib.Path({str(tmp_path)!r}) / f'{{os.getpid()}}.pid'\n"
        "file.with_suffix('.part').write_text(f'{os.getpid()} {os.getppid()}')\n"
        "file.with_suffix('.part').rename(file)\ntime.sleep(600)\n"
    )
    command = f"{sys.executable} {engine} {{model}} {{tokens}} {{out}}"
    words = (
        "--architectures",
        "llama,qwen2",
        "--types",
        "F32",
        "--prompts",
        "one",
        "--workers",
        "2",
        "-o",
        str(tmp_path / "run"),
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "parity", "conform", "--exec", command, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert comes_true(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    process.kill()
    process.wait()
    for file in tmp_path.glob("*.pid"):
        for pid in map(int, file.read_text().split()):
            assert comes_true(lambda pid=pid: ended(pid)), f"{pid} of {file.read_text()}"


@pytest.mark.parametrize("interruption", ["os.kill(os.getpid(), signal.SIGINT)", "exec('os.kill(os.getpid(), signal.SIGINT)')"])
def test_an_interruption_while_commands_are_imported_is_one(interruption: str, tmp_path: Path) -> None:
    """Ctrl-C that falls into the imports of a command, also where they run generated code, ends it like any other."""
    (tmp_path / "typer.py").write_text(f"import os, signal\n{interruption}\n")
    root = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "parity", "--help"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (130, "parity: interrupted\n")


def test_an_interruption_while_an_extension_module_starts_is_not_lost(tmp_path: Path) -> None:
    """Cython's modules clear what is raised while they register themselves; the interruption comes when they are imported."""
    (tmp_path / "interrupting.py").write_text(
        "import collections.abc, os, signal\n"
        "register = collections.abc.Sequence.register\n"
        "def interrupt(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return register(*arguments)\n"
        "from parity.interruptions import end_as_interrupted\n"
        "end_as_interrupted()\n"
        "collections.abc.Sequence.register = interrupt\n"
        "try:\n"
        "    import numpy.random\n"
        "    for _ in range(200):\n"
        "        __import__('time').sleep(0.05)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "interrupting.py")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        check=False,
    )
    assert (ran.stdout, ran.stderr) == ("interrupted\n", "")


def test_the_reference_dying_is_an_error_of_ours(tmp_path: Path) -> None:
    """When llama.cpp's process dies in the middle, the line says so and names the model."""
    words = ["run", "--tokens", ",".join(["5"] * 400), "--points", "all", "--out", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "-m", "parity", *words], stderr=subprocess.PIPE, text=True)
    assert comes_true(lambda: _workers_of(process.pid) != [])
    os.kill(_workers_of(process.pid)[0], signal.SIGABRT)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 2
    assert message.count("\n") == 1
    assert "llama.cpp aborted while" in message
    assert "stories-14m-q8_0.gguf" in message


def _workers_of(pid: int) -> list[int]:
    """The children of a process in which llama.cpp runs."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"reference.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_the_end_of_a_file_is_no_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytecode that is cut short was exit code 130 without a word: typer takes every EOFError for the end of what is typed."""

    def damaged(**_: object) -> None:
        raise EOFError("marshal data too short")

    monkeypatch.setattr(health, "check", damaged)
    assert run(["doctor"]) == 3
    assert "internal error, please report it: EOFError: marshal data too short" in capsys.readouterr().err
