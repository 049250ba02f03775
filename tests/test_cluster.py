"""`parity conform` and `parity drift check` on a Dask cluster: the same answers, a lost worker, a scheduler that goes away."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from cli import Cli, recorded
from foreign import numpy_engine
from processes import comes_true

from parity.run.workers import workers_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("distributed") is None, reason="Dask is not installed: pip install parity[test]"),
]
CELLS = ("--architectures", "llama,qwen2,qwen3", "--types", "F32", "--prompts", "short,one", "--modes", "prefill", "--out", "c")


class Cluster:
    """A scheduler and workers of one thread each, as processes of this machine."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "scheduler.json"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._started("dask_scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard")
        assert comes_true(lambda: self._file.exists() and bool(self._file.read_text())), "the scheduler did not start"
        self.address = json.loads(self._file.read_text())["address"]

    def _started(self, what: str, *options: str) -> "subprocess.Popen[bytes]":
        code = f"import sys; from distributed.cli.{what} import main; sys.argv = ['dask', *sys.argv[1:]]; main()"
        command = [sys.executable, "-c", code, "--scheduler-file", str(self._file), *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self._file.parent)
        self._processes.append(process)
        return process

    def worker(self) -> "subprocess.Popen[bytes]":
        return self._started("dask_worker", "--nworkers", "1", "--nthreads", "1", "--no-dashboard", "--no-nanny")

    def close(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.close()


def test_a_killed_worker_costs_its_cells_only(cluster: Cluster, parity: Cli, tmp_path: Path) -> None:
    """Of two workers one is killed by the engine that it runs, once: every cell has its verdict, and nothing of Dask is printed."""
    for _ in range(2):
        cluster.worker()
    once = tmp_path / "once"
    killer = tmp_path / "killer.sh"
    killer.write_text(f'[ -e {once} ] || {{ touch {once}; kill -9 $PPID; }}\nexec "$@"\n')
    outcome = parity(
        "conform", "--exec", f"sh {killer} {numpy_engine()}", *CELLS, "--cluster", cluster.address, "--format", "json"
    )
    assert outcome.code == 0, outcome.err
    assert once.exists()
    assert outcome.err == ""
    assert [cell["verdict"] for cell in outcome.json["cells"]] == ["parity"] * 4 + ["refused"] * 2
    assert parity.json("conform", "--exec", f"sh {killer} {numpy_engine()}", *CELLS, "--workers", "1")[1]["kept"] == 6


def test_a_scheduler_that_goes_away_is_one_line(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler is killed while cells run: exit 2 and one line, finished cells are kept, and the same command goes on without it."""
    monkeypatch.chdir(tmp_path)
    cluster.worker()
    (tmp_path / "slow.sh").write_text('sleep 2\nexec "$@"\n')
    line = f"sh {tmp_path / 'slow.sh'} {numpy_engine()}"
    command = [sys.executable, "-P", "-m", "parity", "conform", "--exec", line, *CELLS]
    environment = os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    running = subprocess.Popen(
        [*command, "--cluster", cluster.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    results = Path("c/results")
    assert comes_true(lambda: running.poll() is not None or any(results.rglob("*.json")))
    assert running.poll() is None, running.communicate()
    cluster.scheduler.send_signal(signal.SIGKILL)
    out, err = running.communicate(timeout=300)
    assert (running.returncode, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert "the connection to the cluster" in err
    kept = len(list(results.rglob("*.json")))
    done = subprocess.run(
        [*command, "--workers", "1", "--format", "json"], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["kept"] >= kept > 0


def test_a_client_that_closes_late_loses_no_answer(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Dask's client is not closed in time: what it has computed is there, and no error hides it."""
    from distributed import Client

    close = Client.close

    def late(client: Client, *_: object, **__: object) -> None:
        close(client)
        raise TimeoutError("timed out after 2 s.")

    monkeypatch.setattr(Client, "close", late)
    cluster.worker()
    with workers_of(1, cluster.address) as pool:
        assert pool.submit(abs, -1).result() == 1


def test_golden_dumps_are_checked_on_the_cluster(cluster: Cluster, parity: Cli, tmp_path: Path) -> None:
    """drift check on a worker of the cluster gives the same answer as in this process."""
    cluster.worker()
    check = recorded(parity, tmp_path, prompts=3)
    alone, there = parity.json(*check), parity.json(*check, "--cluster", cluster.address)
    assert alone == there
    assert there[0] == 0
