"""A foreign engine's command line: how it is filled in and started, and that the engine cannot block, flood or fool a run."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from cli import Cli, refused
from processes import comes_true, working_in

from checkpoints.errors import InputError
from parity.run.command import CRASHED, LARGEST_DUMP, NOT_STARTED, REFUSED, TIMED_OUT, UNUSABLE, Command, EngineError

MODEL = Path("a model's.gguf")
LINE = '{"checkpoint":"embd","token_idx":0,"values":[1.0]}'


def engine(folder: Path, body: str) -> str:
    """A command line that runs this Python program."""
    path = folder / "engine.py"
    path.write_text(f"import os, sys, time\n{body}\n")
    return f"{sys.executable} {path}"


def ran(line: str, out: Path, **options: object) -> str:
    shell = bool(options.pop("shell", False))
    timeout = float(str(options.pop("timeout", 300)))
    largest_dump = int(str(options.pop("largest_dump", LARGEST_DUMP)))
    Command(line, shell=shell, timeout=timeout, largest_dump=largest_dump).run(
        model=MODEL, tokens=[1, 2, 3], out=out, **options
    )  # type: ignore[arg-type]
    return out.read_text()


def failure(line: str, out: Path, **options: object) -> EngineError:
    with pytest.raises(EngineError) as caught:
        ran(line, out, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000
    return caught.value


def test_placeholders_are_filled_once_and_need_no_quotes(tmp_path: Path) -> None:
    """Model, tokens, points and portions arrive unchanged, even with spaces, quotes and text that looks like a placeholder."""
    line = engine(tmp_path, "open(sys.argv[1], 'w').write('|'.join(sys.argv[2:]))")
    printed = ran(f"{line} {{out}} {{model}} {{tokens}} {{points}} {{portions}}", tmp_path / "o", points="blk.{1..5}.*,{out}")
    assert printed == "a model's.gguf|1,2,3|blk.{1..5}.*,{out}|3"
    printed = ran(f"{line} {{out}} --x={{portions}}", tmp_path / "o", portions=(2, 1))
    assert printed == "--x=2,1"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("./bin/engine --config run.py {tokens}", "engine"),
        ("python3.12 -u tools/engine.py {model}", "engine.py"),
        ("A=1 env B=2 /opt/bin/python -m my.engine {tokens}", "my.engine"),
        ("python -c 'import engine' {tokens}", "python"),
        ("python {model}.py", "python"),
        ("uv run --with numpy python engine.py {out}", "engine.py"),
        ("python -m package.engine --start run.sh {out}", "package.engine"),
        ("python -c 'import engine' settings.py {out}", "python"),
        ("taskset -c 0 node serve.mjs", "serve.mjs"),
        ("cd build; ulimit -v 1000; ./engine {tokens} | sort", "engine"),
        ("export A=1 && python engine.py", "engine.py"),
        ("timeout 10 ./engine {tokens}", "engine"),
        ("nice -n 5 bin/engine --config run.py", "engine"),
        ("uv run python -m my.engine {tokens}", "my.engine"),
        ("mpirun -n 2 --env={out}/x engine", "mpirun"),
        ("env -u HOME -i python engine.py", "engine.py"),
        ("A=1 && ./engine || export B=2", "engine"),
        ("cd", "cd"),
        ("env", "env"),
    ],
)
def test_an_engine_is_called_what_its_interpreter_runs(line: str, name: str) -> None:
    """A script or module is named, not the interpreter, launcher or shell command in front of it; a program keeps its own name."""
    assert Command(line, shell="cd" in line or "export" in line).name == name


def test_standard_output_is_the_dump_without_out(tmp_path: Path) -> None:
    """A command without {out} prints its dump."""
    assert ran(engine(tmp_path, f"print('{LINE}')"), tmp_path / "o").strip() == LINE


def test_leading_assignments_are_the_environment(tmp_path: Path) -> None:
    """NAME=value words in front are set for the engine, placeholders included, and the rest of the environment stays."""
    line = engine(tmp_path, "print(os.environ['A'], os.environ['B'], 'PATH' in os.environ)")
    assert ran(f"A=1 B='x {{tokens}}' {line}", tmp_path / "o").strip() == "1 x 1,2,3 True"
    assert "A" not in os.environ


def test_a_shell_line_is_the_shells(tmp_path: Path) -> None:
    """--exec-shell runs pipes and variables; what is filled in is quoted, so that no path is taken for a command."""
    program = engine(tmp_path, "print(sys.argv[1:])")
    printed = ran(f"X=2; {program} {{model}} $X | tr a-z A-Z", tmp_path / "o", shell=True)
    assert printed.strip() == "[\"A MODEL'S.GGUF\", '2']"


@pytest.mark.parametrize("line", ["", "   ", "A=1", "A=1 B=2 ", "'"])
def test_nothing_to_run_is_an_error(line: str) -> None:
    """An empty command (an unset variable in CI), one of assignments only and one with an open quote are refused."""
    with pytest.raises(InputError, match="--exec"):
        Command(line)


@pytest.mark.parametrize("command", [("run", "--prompt", "hi"), ("drift", "check", "."), ("consistency", "--prompt", "hi")])
@pytest.mark.parametrize("option", ["--exec", "--exec-shell"])
def test_an_empty_command_is_an_error_everywhere(command: tuple[str, ...], option: str, parity: Cli) -> None:
    """`--exec ""` never stands for parity's own engine: exit 2 in every command that takes one."""
    refused(parity(*command, option, ""), f"{option} is empty")


def test_an_engine_that_never_ends_is_stopped(tmp_path: Path) -> None:
    """After the time limit the engine and its children are ended, and the error names the option."""
    line = engine(tmp_path, f"import subprocess; subprocess.run(['sleep', '600'], cwd={str(tmp_path)!r})")
    error = failure(line, tmp_path / "o", timeout=0.4)
    assert error.how == TIMED_OUT
    assert "--exec-timeout" in str(error)
    assert comes_true(lambda: not working_in(tmp_path, but=os.getpid()))


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("a pipe", "os.mkfifo(sys.argv[1]); open(sys.argv[1], 'w').write('x')"),
        ("a pipe", "os.mkfifo(sys.argv[1])"),
        ("a link", "os.symlink('/dev/zero', sys.argv[1]); time.sleep(600)"),
        ("a folder", "os.mkdir(sys.argv[1])"),
    ],
)
def test_a_dump_that_is_no_file_is_refused(what: str, body: str, tmp_path: Path) -> None:
    """An {out} that becomes a pipe, a link or a folder ends the run at once instead of being read for ever."""
    error = failure(f"{engine(tmp_path, body)} {{out}}", tmp_path / "o")
    assert error.how == UNUSABLE  # and not TIMED_OUT
    assert what in str(error)


def test_a_script_with_line_ends_of_windows_is_said_to_be_there(tmp_path: Path) -> None:
    """The system looks for an interpreter of the name "/bin/sh\\r": the line does not say that the script is missing."""
    script = tmp_path / "engine.sh"
    script.write_bytes(b"#!/bin/sh\r\nexit 0\r\n")
    script.chmod(0o755)
    error = failure(f"{script} {{out}}", tmp_path / "o")
    assert "engine.sh: No such file" in error.message
    assert "carriage return" in error.advice


def test_a_file_that_path_does_not_name_is_said_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name is looked for in PATH, not in this folder: nothing is said of the script's first line."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "an-engine"
    script.write_bytes(b"#!/bin/sh\nexit 0\n")
    script.chmod(0o755)
    error = failure("an-engine {out}", tmp_path / "o")
    assert "./an-engine" in error.advice
    assert "first line" not in error.advice


def test_a_dump_without_end_is_stopped(tmp_path: Path) -> None:
    """An engine that writes without end, to stdout or {out}, is stopped."""
    for line in (
        engine(tmp_path, "while True: print('x' * 9999)"),
        engine(tmp_path, "f = open('/dev/stdout', 'w')\nwhile 1: f.write('x' * 9999)"),
    ):
        assert "stopped after it had written" in str(failure(line, tmp_path / "o", largest_dump=1 << 20))


def test_a_flood_on_stderr_keeps_its_last_line(tmp_path: Path) -> None:
    """200 MB on stderr neither block the engine nor stay in memory; the error repeats the last line, cleaned and cut."""
    body = "for _ in range(2000): sys.stderr.write('y' * 100000)\nsys.stderr.write('\\nno \\x1b[31mroom' + 'z' * 9999 + '\\n'); sys.exit(4)"
    error = failure(engine(tmp_path, body), tmp_path / "o")
    assert "no �[31mroom" in str(error)
    assert error.how == REFUSED


def test_a_child_that_holds_stderr_is_not_waited_for(tmp_path: Path) -> None:
    """A background process that keeps the pipe open delays neither a success nor a failure."""
    started = monotonic()
    spawn = "import subprocess; subprocess.Popen(['sleep', '120'], start_new_session=True)\n"
    assert ran(engine(tmp_path, f"{spawn}print('{LINE}')"), tmp_path / "o").strip() == LINE
    assert "exit code 3" in str(failure(engine(tmp_path, f"{spawn}sys.exit(3)"), tmp_path / "o"))
    assert monotonic() - started < 100


@pytest.mark.parametrize(
    ("how", "body"),
    [
        (CRASHED, "os.kill(os.getpid(), 11)"),
        (CRASHED, "raise KeyError('x')"),
        (CRASHED, "sys.exit(1)"),
        (CRASHED, "print('Segmentation violation', file=sys.stderr); sys.exit(139)"),  # as a shell reports signal 11
        (CRASHED, "print('thread main panicked at src/main.rs:7', file=sys.stderr); sys.exit(101)"),
        (REFUSED, "sys.exit('this engine has no mamba')"),
        (NOT_STARTED, "print('env: my-engine: Permission denied', file=sys.stderr); sys.exit(126)"),
        (NOT_STARTED, "print('sh: my-engine: not found', file=sys.stderr); sys.exit(127)"),
    ],
)
def test_a_refusal_is_no_crash(how: str, body: str, tmp_path: Path) -> None:
    """A signal, a traceback or a silent failure is a crash; an exit code with a sentence is a refusal."""
    assert failure(engine(tmp_path, body), tmp_path / "o").how == how


def test_more_ids_than_a_command_line_holds_are_said(tmp_path: Path) -> None:
    """The system takes no argument of 240 kB: the prompt is too long, and the option is not wrong."""
    command = Command(f"{engine(tmp_path, 'pass')} {{tokens}}")
    with pytest.raises(EngineError, match="use a shorter prompt"):
        command.run(model=tmp_path / "m", tokens=[12345] * 40_000, out=tmp_path / "o")


def test_what_an_earlier_run_left_is_not_taken(tmp_path: Path) -> None:
    """An engine that ends well without writing is told so, even if a dump lies there from before."""
    (tmp_path / "o").write_text(LINE)
    assert "did not write" in str(failure(f"{engine(tmp_path, 'pass')} {{out}}", tmp_path / "o"))
    assert "cannot run" in str(failure("/nowhere/engine {out}", tmp_path / "o"))


@pytest.mark.parametrize(
    ("number", "said"), [(11, "was killed by SIGSEGV: "), (64, "was killed by SIGRTMAX: "), (50, "was killed by signal 50: ")]
)
def test_a_signal_is_named(number: int, said: str, tmp_path: Path) -> None:
    """SIGSEGV says more than 11; some numbers for real-time use have no name."""
    assert said in str(failure(engine(tmp_path, f"os.kill(os.getpid(), {number})"), tmp_path / "o"))


def test_an_engine_ends_with_a_request_to_end_that_comes_while_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, or SIGTERM, at the moment when the engine runs and nobody holds it yet leaves no engine behind."""

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            ran(engine(tmp_path, "time.sleep(600)"), tmp_path / "o")
    finally:
        signal.signal(signal.SIGINT, before)
    assert comes_true(lambda: not working_in(tmp_path, but=os.getpid()))
