"""What ends or spoils a conformance run is one line: engines that crash, hang or change, servers that do not start, wrong requests."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cli import Cli, one_line, refused
from processes import comes_true, ended, working_in

from parity.conform.results import alone


def test_a_server_that_does_not_start(parity: Cli, tmp_path: Path) -> None:
    """One that says no is a refusal, one that never listens is timed out, one that ends is unusable; none is left behind."""
    words = ("--side", "server", "--architectures", "llama", "--types", "F32", "--prompts", "one", "--modes", "prefill")
    for body, verdict, seconds in (
        ("sys.exit('no')", "refused", 30),
        ("time.sleep(600)", "timed out", 0.7),
        ("pass", "unusable", 30),
    ):
        (tmp_path / "server.py").write_text(f"import sys, time\n{body}\n")
        ran = parity(
            "conform",
            "--exec",
            f"{sys.executable} server.py {{model}} {{port}}",
            *words,
            "--exec-timeout",
            seconds,
            "--out",
            "c",
        )
        cells = json.loads(Path("c/conform.json").read_text())["cells"]
        assert [cell["verdict"] for cell in cells] == [verdict], ran.err
    assert comes_true(lambda: not working_in(tmp_path, but=os.getpid()))
    refused(parity("conform", "--side", "server", "--exec", "server {model}"), "{port}")
    refused(parity("conform", "--exec", "server {model} {port}"), "--side server")


def test_an_engine_that_cannot_be_started_ends_the_run(parity: Cli) -> None:
    """`env` and shells say with 126 and 127 that there is no such program: one line, exit 2, no cell counts as refused."""
    words = ("--architectures", "llama", "--types", "F32", "--prompts", "one,short", "--workers", "1", "--out", "c")
    for option, line, status in (
        ("--exec", "env X=1 ./nothing {model}", 127),
        ("--exec", "env /etc/passwd {model}", 126),
        ("--exec-shell", "./nothing {model}", 127),
    ):
        refused(parity("conform", option, line, *words), f"could not be started (exit code {status})", f"Check {option}")
    assert not list(Path("c").rglob("results/*/*.json"))
    ran = parity("conform", "--exec", f"{sys.executable} -c 'import sys; sys.exit(\"no\")' {{model}}", *words)
    assert (ran.code, ran.out.splitlines()[-1].split(" · ")[0]) == (2, "2 cells: 2 refused")
    one_line(ran.err, "refused all 2 cells", "exit code 1: no")


def test_an_engine_that_changes_or_leaves_children_while_it_runs(parity: Cli, tmp_path: Path) -> None:
    """Results of an unknown build are shown but not kept; processes that an engine leaves behind are ended."""
    engine = tmp_path / "engine.sh"
    words = ("--architectures", "llama", "--types", "F32", "--prompts", "one", "--workers", "1", "--out", "c")
    engine.write_text("echo '#' >> $0\nsleep 600 & echo $! > child\necho no >&2; exit 1\n")
    ran = parity("conform", "--exec", f"sh {engine} {{model}}", *words)
    assert "1 not kept since a file of the engine changed" in ran.out
    assert not list(Path("c").rglob("results/*/*.json"))
    assert comes_true(lambda: ended(int(Path("child").read_text())))


def test_two_runs_do_not_share_a_folder(parity: Cli) -> None:
    """While one run holds the folder, another is refused in one line; afterwards it is free again."""
    words = ("--side", "ours", "--architectures", "llama", "--types", "F32", "--prompts", "one", "--out", "c")
    with alone(Path("c")):
        refused(parity("conform", *words), "another run of parity conform uses c", "--out")
    assert parity("conform", *words).code == 0


def test_an_engine_that_crashes_or_hangs_or_prints_nothing(parity: Cli, tmp_path: Path) -> None:
    """Each is a verdict of its own and a failure; the run goes on."""
    words = ("--architectures", "llama", "--types", "F32", "--prompts", "one")
    for body, options, verdict in (
        ("import os; os.kill(os.getpid(), 11)", (), "crashed"),
        ("import time; time.sleep(600)", ("--exec-timeout", "0.5"), "timed out"),
        ("pass", (), "unusable"),
    ):
        (tmp_path / "engine.py").write_text(body)
        code, answer = parity.json("conform", "--exec", f"{sys.executable} engine.py {{model}}", *words, *options)
        assert (code, [cell["verdict"] for cell in answer["cells"]]) == (1, [verdict])


def test_what_it_refuses(parity: Cli) -> None:
    """No side or two, a server's options without one, unknown names or program, modes that the engine cannot be told, and a matrix of
    which nothing was compared.
    """
    refused(parity("conform"), "no engine to test was given", "--exec CMD")
    refused(parity("conform", "--exec", "x", "--side", "ours"), "more than one engine to test was given", "Use one of")
    for option in (("--server-api", "openai"), ("--server-json", "{}")):
        refused(parity("conform", "--side", "ours", *option), "need a server")
    refused(parity("conform", "--exec", "", "--types", "F32"), "--exec is empty")
    refused(parity("conform", "--side", "ours", "--architectures", "qwen9"), "qwen9", "qwen")
    refused(parity("conform", "--side", "ours", "--profile", "everything"), "--profile 'everything' is unknown")
    for mode, needed in (("decode", "{portions}"), ("batch", "{sequences}"), ("state", "{state}")):
        refused(parity("conform", "--exec", "x {model}", "--modes", mode), needed)
    server = ("--side", "server", "--exec", "server {model} {port}")
    refused(parity("conform", *server, "--modes", "batch"), "This side has the modes prefill, decode")
    refused(parity("conform", "--exec", "./no-such-engine {model}"), "cannot run ./no-such-engine")
    refused(parity("conform", "--exec", "PATH=/nowhere python3 {model}"), "cannot run python3")
    refused(parity("conform", "--side", "hf", "--python", "no-such-python"), "no-such-python")
    refused(parity("conform", "--side", "ours", "--table", "x.txt"), ".csv")
    line = f"{sys.executable} -c 'import sys; sys.exit(\"no\")'"
    ran = parity(
        "conform", "--exec", line, "--architectures", "llama", "--types", "F32", "--prompts", "one", "--format", "json"
    )
    assert ran.code == 2


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(parity: Cli) -> None:
    """Without Dask, or without a scheduler at the address, --cluster is refused before anything runs."""
    words = ("conform", "--side", "ours", "--architectures", "llama", "--types", "F32", "--prompts", "one")
    refused(parity(*words, "--cluster", "tcp://127.0.0.1:9"), "cluster" if find_spec("distributed") is None else "scheduler")
