"""Golden dumps: numbers that move are found, other changes are distinguished, and margins are kept over commits."""

import json
import resource
import shutil
import signal
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from cli import Cli, recorded, refused
from slow import slow_but

from checkpoints.answers.drift import Entry
from checkpoints.errors import InputError
from engine.backend import choose
from engine.faults import CATALOGUE, plant
from engine.graph import Step
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.drift import ledger
from parity.drift.checking import Checking, check
from parity.drift.golden import Golden, load
from parity.drift.recording import GoldenRecording, record
from parity.models import embedded as default_model
from parity.run.ours import OursJob, dump
from parity.run.request import Request

PROMPTS = "Once upon a time there was a little dog who liked to run\nThe\n"
TEN = (
    "rope-pairs", "rope-base", "no-qkv-bias", "norm-epsilon", "gqa-modulo", "no-causal-mask", "gate-up-swapped", "transposed",
    "no-final-norm", "q4k-scale-min",
)  # fmt: skip
STORED = Path(__file__).parent / "golden" / "stories"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Golden dumps of the stories model by llama.cpp, two prompts."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return record(
        GoldenRecording(Request(model=default_model.path(), generate=1), folder / "prompts.txt", folder / "stories")
    ).golden


def dumps(golden: Golden, engine: Transformer, folder: Path, steps: list[Step] | None = None) -> tuple[Path, ...]:
    """What an engine with these steps writes for each prompt."""
    right, engine.steps = engine.steps, steps if steps is not None else engine.steps
    paths = []
    try:
        for prompt in golden.prompts:
            path = folder / f"ours-{prompt.file}"
            led = {"generated": prompt.generated, "generated_pieces": prompt.generated_pieces}
            dump(engine, OursJob(path, prompt.tokens, pieces=prompt.pieces, prompt=prompt.text, **led))
            paths.append(path)
    finally:
        engine.steps = right
    return tuple(paths)


@pytest.fixture(scope="module")
def engine(stories: Path) -> Transformer:
    """Our engine on the stories model."""
    return Transformer(GgufModel(stories), choose("numpy"))


@pytest.mark.parametrize("cut", ["in a line", "after a line"])
def test_a_golden_dump_that_is_cut_short_is_no_drift(cut: str, parity: Cli, tmp_path: Path) -> None:
    """Half a golden dump says nothing about an engine: one line and exit 2 before anything is run, wherever it was cut."""
    shutil.copytree(STORED, tmp_path / "cut")
    dump = tmp_path / "cut" / "001.jsonl"
    lines = dump.read_bytes().splitlines(keepends=True)
    dump.write_bytes(b"".join(lines[:-1]) if cut == "after a line" else dump.read_bytes()[: dump.stat().st_size // 2])
    ran = parity("drift", "check", tmp_path / "cut", "--exec", "false {tokens}")
    refused(ran, "001.jsonl is cut short. Restore it, or record again")


def test_nothing_is_written_over_what_a_check_reads(parity: Cli, tmp_path: Path) -> None:
    """A ledger, a report or a summary is none of the golden files, and no line is appended to a file that is no ledger."""
    folder = tmp_path / "golden"
    shutil.copytree(STORED, folder)
    (tmp_path / "notes.txt").write_text("mine\n")
    (folder / "ledger.jsonl").write_text("")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for option in ("--ledger", "--junit", "--summary"):
        for name in ("drift.json", "000.jsonl"):
            refused(parity("drift", "check", folder, option, folder / name), f"{name} is an input of this command")
    for option in ("--junit", "--summary"):
        refused(parity("drift", "check", folder, option, folder / "ledger.jsonl"), "ledger.jsonl is an input of this command")
    refused(parity("drift", "check", folder, "--ledger", tmp_path / "notes.txt"), "notes.txt is not a ledger of checks")
    refused(parity("drift", "history", folder, "--html", folder / "drift.json"), "drift.json is an input")
    (tmp_path / "torn.jsonl").write_text('{"sch')  # by a check that was killed while it wrote its first line
    refused(parity("drift", "history", folder, "--ledger", tmp_path / "torn.jsonl"), "torn.jsonl has no entry")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_both_sides_pass_and_are_noted(golden: Golden, parity: Cli) -> None:
    """llama.cpp repeats itself to the bit, our engine passes with a margin, and each check is one line of the ledger."""
    code, again = parity.json("drift", "check", golden.folder)
    assert (code, again["verdict"], {point["nmse"] for point in again["points"]}) == (0, "parity", {0.0})
    code, ours = parity.json("drift", "check", golden.folder, "--side", "ours")
    assert (code, ours["verdict"]) == (0, "parity")
    margins = [point["margin"] for point in ours["points"] if point["margin"] is not None]
    assert margins
    assert min(margins) > 100, "the limit is two orders above the floor; some of it may be used up"
    entries, skipped = ledger.read(golden.folder / ledger.NAME)
    assert [entry.source for entry in entries] == ["ref", "ours"]
    assert not skipped
    assert {"llama_cpp_python", "threads", "backend"} <= entries[0].versions.keys()
    assert set(entries[1].points) == {point["checkpoint"] for point in ours["points"]}
    shown = parity("drift", "history", golden.folder)
    assert shown.code == 0
    assert "our engine against golden dumps" in shown.out


def test_an_engine_that_prints_bare_lines_is_checked(golden: Golden, engine: Transformer, tmp_path: Path, parity: Cli) -> None:
    """Lines without a header and without positions are checked like any other dump, by exact limits with --compute f32."""
    words: list[object] = ["drift", "check", golden.folder, "--no-ledger"]
    for path in dumps(golden, engine, tmp_path):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        bare = [{"checkpoint": line["checkpoint"], "values": line["values"]} for line in lines if "values" in line]
        path.write_text("".join(json.dumps(line) + "\n" for line in bare))
        words += ["--ours", path]
    for options, limit in ((("--compute", "f32"), 1e-10), ((), 3e-4)):
        code, answer = parity.json(*words, *options)
        assert (code, answer["points"][0]["limit"]) == (0, limit)


def test_no_drift_by_an_assumed_limit_says_so(golden: Golden, engine: Transformer, tmp_path: Path, parity: Cli) -> None:
    """Bare lines that are as near as float32 is are simply right; off by 1 in 2,000 they agree only by a limit that is assumed."""
    for factor, said in ((1.0, "no drift: "), (1.0005, "no drift (limit assumed): ")):
        words: list[object] = ["drift", "check", golden.folder, "--no-ledger"]
        for path in dumps(golden, engine, tmp_path):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            bare = [{name: line[name] for name in ("checkpoint", "token_idx", "values")} for line in lines if "values" in line]
            for line in bare:
                line["values"] = [value * (1.0 if line["checkpoint"] == "embd" else factor) for value in line["values"]]
            path.write_text("".join(json.dumps(line) + "\n" for line in bare))
            words += ["--ours", path]
        shown = parity(*words)
        assert shown.code == 0
        assert shown.out.splitlines()[-1].startswith(said)
        assert ("would be a divergence; --compute f32" in shown.out) is (factor != 1.0)


def test_points_that_were_not_recorded_are_no_drift(golden: Golden, tmp_path: Path, parity: Cli) -> None:
    """An engine that prints more points than the golden dumps have is compared at theirs; a note names the others."""
    more = []
    for prompt in golden.prompts:
        lines = golden.path(prompt).read_text(encoding="utf-8").splitlines(keepends=True)
        doubled = [line.replace('"blk.5.l_out"', '"blk.6.l_out"') for line in lines if '"blk.5.l_out"' in line]
        more.append(tmp_path / prompt.file)
        more[-1].write_text("".join([*lines[:-1], *doubled]), encoding="utf-8")
    ran = parity("drift", "check", golden.folder, *(word for path in more for word in ("--ours", path)), "--no-ledger")
    assert ran.code == 0, ran.out
    assert "not compared, since the golden dumps lack them: blk.6.l_out" in ran.out


@pytest.mark.parametrize("name", slow_but(TEN, "rope-pairs", "norm-epsilon", "no-final-norm"))
def test_each_fault_is_drift(
    name: str, golden: Golden, engine: Transformer, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each of the ten faults, most of them in one layer only, is found against golden dumps of the default points."""
    if name == "q4k-scale-min":  # a fault of a file type
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("Once upon a time\n", encoding="utf-8")
        golden = record(GoldenRecording(Request(model=quantized("Q4_K_M"), generate=1), prompts, tmp_path / "golden")).golden
        engine = Transformer(GgufModel(quantized("Q4_K_M")), choose("numpy"))
        assert check(Checking(golden.folder, dumps=dumps(golden, engine, tmp_path), keep_ledger=False))
    # Another ε in layer 7 alone stays below the limit at the default points: what it is added to is large by then.
    layers = None if name in ("no-final-norm", "norm-epsilon") else [7]
    wrong = dumps(golden, engine, tmp_path, plant(engine.steps, CATALOGUE[name], layers=layers))
    answer = check(Checking(golden.folder, dumps=wrong, keep_ledger=False))
    assert answer.verdict == "divergence"


@pytest.mark.slow
def test_a_tenth_of_epsilon_is_drift_and_a_fiftieth_grows(
    golden: Golden, engine: Transformer, tmp_path: Path, parity: Cli
) -> None:
    """ε 1e-6 → 1.1e-6 leaves the limit; 1.02e-6 stays within it and is a finding, which only --strict fails on."""
    fault, book = CATALOGUE["norm-epsilon"], tmp_path / "ledger.jsonl"

    def run(eps: float, *options: str) -> tuple[int, dict[str, object]]:
        steps = plant(engine.steps, fault, eps=eps) if eps != engine.hp.eps else engine.steps
        paths = dumps(golden, engine, tmp_path, list(steps))
        arguments = [word for path in paths for word in ("--ours", path)]
        return parity.json("drift", "check", golden.folder, *arguments, "--ledger", book, *options)

    assert run(engine.hp.eps)[0] == 0
    code, answer = run(1.1e-6)
    assert (code, answer["verdict"]) == (1, "divergence")
    code, answer = run(1.02e-6)
    assert (code, answer["verdict"]) == (0, "parity")
    assert any("blk.0.l_out" in str(finding) for finding in answer["findings"]), answer  # type: ignore[attr-defined]
    assert run(1.02e-6, "--strict")[0] == 1


@pytest.mark.slow
def test_what_is_no_drift_is_told_apart(golden: Golden, quantized: Callable[[str], Path], tmp_path: Path, parity: Cli) -> None:
    """Another model file, prompt set or mode exits 2 and is named; with --bisect it exits 125 (tests below), never 1."""
    other = tmp_path / "other.txt"
    other.write_text("Once upon a time\n", encoding="utf-8")
    for code, *options in (
        ("model-changed", "--model", quantized("Q4_K_M")),
        ("prompts-changed", "--prompts", other),
        ("mode-changed", "--mode", "native"),
    ):
        ran, answer = parity.json("drift", "check", golden.folder, *options)
        assert (ran, answer["error"]["code"]) == (2, code)


@pytest.mark.parametrize("damage", ["no folder", "no json", "a list", "a missing dump", "another folder's dump", "newer"])
def test_a_damaged_folder_is_one_line(damage: str, golden: Golden, tmp_path: Path, parity: Cli) -> None:
    """Whatever is wrong with a golden folder: exit 2 with one line, no traceback."""
    folder = tmp_path / "g"
    if damage != "no folder":
        folder.mkdir()
        facts = json.loads((golden.folder / "drift.json").read_text(encoding="utf-8"))
        if damage == "another folder's dump":
            facts["prompts"][0]["file"] = "../000.jsonl"
        if damage == "newer":
            facts["format"] = 2
        text = {"no json": "{", "a list": "[]"}.get(damage, json.dumps(facts))
        (folder / "drift.json").write_text(text, encoding="utf-8")
    ran = parity("drift", "check", folder)
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.err


@pytest.mark.slow
def test_update_rewrites_what_it_shows(golden: Golden, tmp_path: Path, parity: Cli) -> None:
    """--update takes the new numbers of the points that moved; every other line stays, to the byte."""
    folder = tmp_path / "moved"
    folder.mkdir()
    for path in golden.folder.glob("*.json*"):
        (folder / path.name).write_bytes(path.read_bytes())
    right = (folder / "000.jsonl").read_bytes()
    lines = right.splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if b'"blk.5.l_out"' in line)
    record_ = json.loads(lines[at])
    record_["values"][0] += 1.0
    lines[at] = json.dumps(record_).encode() + b"\n"
    (folder / "000.jsonl").write_bytes(b"".join(lines))
    code, answer = parity.json("drift", "check", folder)
    assert (code, answer["updated"]) == (1, [])
    ran = parity("drift", "check", folder, "--update")
    assert ran.code == 0
    assert "blk.5.l_out" in ran.out
    assert (folder / "000.jsonl").read_bytes() == right
    assert len(load(folder).updates) == 1
    assert parity("drift", "check", folder).code == 0
    refused = parity("drift", "check", folder, "--side", "ours", "--update")
    assert refused.code == 2, "another side's numbers are no update"


@pytest.mark.slow
def test_a_new_llama_cpp_is_named(golden: Golden, tmp_path: Path, parity: Cli) -> None:
    """Golden dumps that say another llama-cpp-python: the check names both versions and whether numbers moved."""
    folder = tmp_path / "older"
    folder.mkdir()
    for path in golden.folder.glob("*.json*"):
        text = path.read_text(encoding="utf-8")
        (folder / path.name).write_text(text.replace('"llama_cpp_python":"', '"llama_cpp_python":"0.0.'), encoding="utf-8")
    code, answer = parity.json("drift", "check", folder)
    assert code == 0
    assert [change["what"] for change in answer["changes"]] == ["llama_cpp_python"]
    assert "llama_cpp_python was 0.0." in parity("drift", "check", folder).out


@pytest.mark.slow
def test_every_order_and_thread_count_passes(golden: Golden, parity: Cli, tmp_path: Path) -> None:
    """Prompts in another order on another number of threads: no alarm, no finding."""
    turned = tmp_path / "turned.txt"
    turned.write_text("\n".join(reversed(PROMPTS.splitlines())), encoding="utf-8")
    for threads in (1, 2):
        code, answer = parity.json(
            "drift", "check", golden.folder, "--threads", threads, "--prompts", turned, "--ledger", tmp_path / "l.jsonl"
        )
        assert (code, answer["findings"]) == (0, [])


def test_a_ledger_tells_the_best_and_what_came_closer() -> None:
    """The best error of a point is that of checks that passed; of points that came nearer to their limit, the most grown is first."""

    def entry(day: int, verdict: str, **of_limit: float) -> Entry:
        points = {name: (1e-12, 1e-10, share) for name, share in of_limit.items()}
        return Entry(f"2026-01-0{day}T00:00:00+00:00", "abc", verdict, "ours", "f00d", {}, points)

    entries = [entry(1, "parity", embd=0.2, kq=0.01, logits=0.1), entry(2, "divergence", embd=0.1, kq=3.0, logits=0.1)]
    assert ledger.best(entries, "embd") == 0.2
    assert ledger.best(entries[1:], "embd") is None
    entries.append(entry(3, "parity", embd=0.4, kq=0.05, logits=0.1))
    since = datetime.fromisoformat(entries[0].time)
    assert [point.name for point in ledger.closer(entries, since)] == ["kq", "embd"]


def test_a_ledger_is_read_back(tmp_path: Path) -> None:
    """A ledger reads back as written, zero and infinite errors included; a torn line is counted, not fatal."""
    path = tmp_path / "ledger.jsonl"
    points = {"embd": (0.0, 1e-10, 0.0), "logits": (float("inf"), 1e-9, float("inf")), "kq": (1e-14, 1e-10, 0.5)}
    entry = Entry("2026-01-01T00:00:00+00:00", "abc", "divergence", "ours", "f00d", {"backend": "numpy"}, points)
    ledger.append(path, entry)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"schema": 1, "time"')
    assert ledger.read(path) == ([entry], 1)
    ledger.append(path, entry)  # a line that was cut short takes none with it
    assert ledger.read(path) == ([entry, entry], 1)
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))  # as a disk that is full
    try:
        with pytest.raises(InputError, match="cannot write"):
            ledger.append(path, entry)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_the_stored_golden_dumps_hold(parity: Cli) -> None:
    """The golden dumps of this repository agree with our engine and with the llama.cpp that is installed here."""
    for side in ("ours", "ref"):
        assert parity("drift", "check", STORED, "--side", side, "--no-ledger").code == 0
    assert sum(path.stat().st_size for path in STORED.iterdir()) < 400_000


@pytest.mark.slow
def test_golden_prompts_on_workers(parity: Cli, tmp_path: Path) -> None:
    """Four golden prompts checked by two processes give the answer of one process, and the worst record of each point."""
    check = recorded(parity, tmp_path, prompts=4)
    alone, together = parity.json(*check), parity.json(*check, "--workers", "2")
    assert alone[0] == together[0] == 0
    assert alone[1] == together[1]
    ran = parity(*check, "--cluster", "tcp://127.0.0.1:9")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
