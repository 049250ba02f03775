"""Drift and reports, measured: false alarms over 200 right runs, the floor over BLAS kernels, a long ledger, a huge report.

python benchmarks/drift.py [alarms|floor|ledger|report]
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from time import perf_counter

import numpy as np
from msgspec.structs import replace

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "tests" / "golden" / "stories"
RUNS = 50  # for each of two sides on one and two threads: 200
# Kernel families of OpenBLAS, as machines of other kinds would choose them: each sums in another order.
CORES = ("", "Prescott", "Nehalem", "Sandybridge", "Haswell", "Zen")


def alarms() -> None:
    """200 runs of two right engines, threads 1 and 2, prompts in random order: divergences and findings among them."""
    print("side  threads  runs  divergences  findings  worst of limit")
    for side in ("ours", "ref"):
        for threads in (1, 2):
            margins = _child("runs", side, str(threads), OPENBLAS_NUM_THREADS=str(threads))
            print(
                f"{side:<4}  {threads:>7}  {margins['runs']:>4}  {margins['divergences']:>11}  "
                f"{margins['findings']:>8}  {margins['worst']:.4f}"
            )


def floor() -> None:
    """Our engine against the stored golden dumps: the worst error of exact mode by BLAS kernels and threads."""
    print("kernels      threads  worst NMSE  of limit  at")
    for core in CORES:
        for threads in (1, 2):
            settings = {"OPENBLAS_NUM_THREADS": str(threads)} | ({"OPENBLAS_CORETYPE": core} if core else {})
            margins = _child("floor", **settings)
            print(
                f"{core or 'this CPU':<11}  {threads:>7}  {margins['nmse']:>10.1e}  {margins['of_limit']:>8.4f}  {margins['checkpoint']}"
            )


def ledger() -> None:
    """Reading and showing a ledger of 10,000 checks of 7 points."""
    from checkpoints.answers.drift import Entry
    from parity.drift import ledger as book
    from reports.history import lines

    points = dict.fromkeys(("embd", *(f"blk.{n}.l_out" for n in (0, 5, 10, 23)), "output_norm", "logits"), (1e-13, 1e-10, 1e-3))
    versions = {"version": "0.1.0", "backend": "numpy", "threads": "2"}
    entry = Entry("2026-01-01T00:00:00+00:00", "0" * 40, "parity", "ours", "f00d", versions, points)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        book.append(path, entry)
        path.write_bytes(path.read_bytes() * 10_000)
        began = perf_counter()
        entries, _ = book.read(path)
        read = perf_counter() - began
        began = perf_counter()
        shown = list(lines(entries, 100))
        times = f"read {read:.2f} s, shown {perf_counter() - began:.2f} s in {len(shown)} lines"
        print(f"{len(entries):,} checks, {path.stat().st_size / 2**20:.1f} MiB: {times}")


def report() -> None:
    """Comparing and drawing 24 layers × all points × 512 positions."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from dumps import dump, noisy, spoiled

    from checkpoints.points import all_points, parse
    from parity.diff.compare import comparison
    from reports.html import html
    from reports.report import Report

    names = [name for name in all_points(24) if parse(name).kind not in ("kq", "kq_soft_max", "k_read", "v_read")]
    names += [f"blk.{layer}.other{n}" for layer in range(24) for n in range(4)]  # as many nodes of the reference's own
    rng = np.random.default_rng(0)
    right = {name: rng.standard_normal((512, 64)).astype(np.float32) for name in names}
    wrong = spoiled(noisy(right), names[200:], slice(3, None))
    ours, ref = dump(wrong), dump(right)
    began = perf_counter()
    comparing = comparison(ours, ref)
    picture = comparing.picture
    compared = perf_counter() - began
    began = perf_counter()
    text = html(Report(comparing.verdict, ours, ref, picture))
    built = perf_counter() - began
    print(
        f"{comparing.verdict.compared:,} records of {len(names)} points: compared {compared:.1f} s, "
        f"report {built:.1f} s, {len(text) / 1e6:.1f} MB"
    )


def _child(what: str, *arguments: str, **settings: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), f"_{what}", *arguments]
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _runs(side: str, threads: str) -> None:
    from parity.drift.checking import Checking, check
    from parity.drift.dumps import GoldenDumps
    from parity.drift.golden import load
    from parity.run.request import Request
    from reference.client import Reference

    golden = load(GOLDEN)
    shuffle = random.Random(0)
    divergences = findings = 0
    worst = 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Reference(threads=int(threads))) as reference,
    ):
        run = Request(
            model=golden.model_path(None),
            mode=golden.mode,
            points=golden.points,
            slice_size=golden.slice_size,
            threads=int(threads),
            backend="numpy",
        )
        dumps = GoldenDumps(side, run, reference)
        for _ in range(RUNS):
            prompts = list(golden.prompts)
            shuffle.shuffle(prompts)
            for prompt in prompts:
                dumps.write(prompt.prompt, Path(folder) / prompt.file)
            paths = tuple(Path(folder) / prompt.file for prompt in prompts)
            checked = check(Checking(GOLDEN, dumps=paths, ledger=Path(folder) / "ledger.jsonl"))
            divergences += not checked
            findings += len(checked.findings)
            worst = max([worst, *(point.of_limit for point in checked.points)])
    print(json.dumps({"runs": RUNS, "divergences": divergences, "findings": findings, "worst": worst}))


def _floor() -> None:
    from parity.drift.checking import Checking, check

    checked = check(replace(Checking(GOLDEN), side="ours", keep_ledger=False, backend="numpy"))
    worst = max(checked.points, key=lambda point: point.of_limit)
    print(json.dumps({"nmse": worst.nmse, "of_limit": worst.of_limit, "checkpoint": worst.checkpoint}))


TABLES = {"alarms": alarms, "floor": floor, "ledger": ledger, "report": report}

if __name__ == "__main__":
    if sys.argv[1:2] == ["_runs"]:
        _runs(*sys.argv[2:])
    elif sys.argv[1:2] == ["_floor"]:
        _floor()
    else:
        for name in sys.argv[1:] or TABLES:
            TABLES[name]()
            print()
