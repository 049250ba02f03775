"""An output replaces an existing file only when it is complete, and no other file is touched on the way."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from cli import Cli, limited, one_line, refused

from checkpoints.jsonl import Writer
from checkpoints.reading.reader import read
from checkpoints.record import Header
from checkpoints.tensors import TensorWriter
from checkpoints.whole_file import Replacement, make_folders, put, remove_empty
from parity.models import embedded
from parity.run.request import Request
from parity.run.session import run_folder

ROOT = Path(__file__).parent.parent
MODEL_SIZE = 1_000_000  # bytes of a small synthetic model, and more


@pytest.mark.parametrize("kind", ["f32", "q4_k_m"])
def test_a_full_disk_leaves_the_old_model(tmp_path: Path, kind: str) -> None:
    """`synth` over an existing file that cannot be written whole leaves it byte for byte, and nothing beside it."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"the one before")
    ran = limited(("synth", "-o", path, "--type", kind, "--width", 256, "--heads", 4, "--ff", 256), MODEL_SIZE)
    assert ran.returncode == 2
    one_line(ran.stderr, f"cannot write {path}: ")
    assert "too large" in ran.stderr or "only part of it" in ran.stderr
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("m.gguf", b"the one before")]


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_dump(stories_run: Path, tmp_path: Path) -> None:
    """`convert` and `dump` over an existing dump that cannot be written whole leave it byte for byte."""
    path = tmp_path / "d.jsonl"
    path.write_bytes((stories_run / "ours.jsonl").read_bytes())
    before = path.read_bytes()
    for words in (
        ("convert", stories_run / "ref.jsonl", "-o", path),
        ("dump", "ours", "--tokens", "5,6,7,8", "--points", "all", "-o", path),
        ("dump", "ref", "--tokens", "5,6,7,8", "--points", "all", "--mode", "native", "-o", path),
    ):
        ran = limited(words, 4000)
        assert ran.returncode == 2
        one_line(ran.stderr, "d.jsonl: File too large")
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"d.jsonl": before}


def test_what_a_killed_run_left_is_removed_by_the_next_that_writes_it(tmp_path: Path) -> None:
    """Half a file of a process that is gone goes with the next writing of the same file; others' stay, and those being written."""
    code = (
        "import os, sys; from pathlib import Path; from checkpoints.whole_file import Replacement;"
        "r = Replacement(Path(sys.argv[1])); r.temporary.write_bytes(b'half'); os._exit(9)"
    )
    for name in ("a.html", "b.html"):
        subprocess.run([sys.executable, "-c", code, tmp_path / name], cwd=ROOT, check=False)
    assert len(list(tmp_path.iterdir())) == 2
    with Replacement(tmp_path / "a.html") as held:
        held.temporary.write_bytes(b"mine")
        put(tmp_path / "a.html", b"whole")
        assert held.temporary.read_bytes() == b"mine"
        assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "a.html").read_bytes() == b"mine"
    assert len([file for file in tmp_path.iterdir() if ".b.html." in file.name]) == 1


def test_links_that_others_planted_are_not_followed(tmp_path: Path) -> None:
    """Names that a program could guess lead nowhere: what links of such names point to stays as it is."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("x.html.partial", "x.html.part", "o.safetensors.part", "o.safetensors.whole", ".x.html.part", "o.jsonl.part"):
        (folder / name).symlink_to(victim)
    put(folder / "x.html", b"page")
    with TensorWriter(folder / "o.safetensors"):
        pass
    with Writer(folder / "o.jsonl", Header("x"), whole=True):
        pass
    assert victim.read_bytes() == b"precious"
    assert not (folder / "x.html").is_symlink()


def test_a_link_stays_one(tmp_path: Path) -> None:
    """An output that is a link is written where the link points to, whole."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "real" / "page.html")
    put(tmp_path / "link.html", b"page")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real" / "page.html").read_bytes() == b"page"


def test_permissions_of_what_is_replaced_stay(tmp_path: Path) -> None:
    """A file that only its owner may read is replaced by one that only its owner may read."""
    path = tmp_path / "page.html"
    path.write_bytes(b"")
    path.chmod(0o600)
    put(path, b"page")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    """The temporary name is as short as it must be, also where the file's own name could not be longer."""
    path = tmp_path / ("é" * 125 + ".html")
    put(path, b"page")
    assert path.read_bytes() == b"page"
    assert len(list(tmp_path.iterdir())) == 1


def test_folders_are_made_as_deep_as_the_system_takes_them(tmp_path: Path) -> None:
    """1,500 folders in each other are made one after the other, not by recursion, and removed again."""
    made = make_folders(tmp_path / Path(*["d"] * 1500))
    assert len(made) == 1500
    assert made[0].is_dir()
    remove_empty(made)
    assert not list(tmp_path.iterdir())


def test_a_dump_appears_line_by_line_where_nothing_stood(tmp_path: Path) -> None:
    """A new dump can be read while it is written; one that replaces another takes its place when it is complete."""
    path = tmp_path / "d.jsonl"
    with Writer(path, Header("first")):
        assert b"first" in path.read_bytes()
    with Writer(path, Header("second")):
        assert b"first" in path.read_bytes()
    assert b"second" in path.read_bytes()
    with pytest.raises(KeyError), Writer(path, Header("third")):
        raise KeyError
    assert b"second" in path.read_bytes()
    assert len(list(tmp_path.iterdir())) == 1


@contextmanager
def piped(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A pipe at `path` that somebody reads."""
    os.mkfifo(path)
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as reader:
        yield reader


def test_pipes_are_written_to_as_they_are(parity: Cli, stories_run: Path, tmp_path: Path) -> None:
    """A dump can go into a pipe; a model cannot, and the line says so."""
    with piped(tmp_path / "pipe") as reader:
        assert parity("convert", stories_run / "ours.jsonl", "-o", tmp_path / "pipe").code == 0
        assert reader.stdout is not None
        assert reader.stdout.read() == (stories_run / "ours.jsonl").read_bytes()
    command = [sys.executable, "-P", "-m", "parity", "convert", stories_run / "ours.jsonl", "-o", "/dev/stdout"]
    printed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
    assert printed.stdout == (stories_run / "ours.jsonl").read_bytes()
    refused(parity("convert", stories_run / "ours.jsonl", "-o", "-"), '"-" is standard input', "/dev/stdout")
    refused(parity("synth", "-o", "/dev/null"), "cannot write a model to /dev/null")
    assert read(stories_run / "ours.jsonl").end is not None


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (("--layers", "100000000"), "at most 512 layers"),
        (("--architecture", "gemma3", "--layers", "100000000"), "at most 512 layers"),
        (("--vocab", "1000000000"), "would take"),
        (("--vocab", "1000000000", "--type", "q4_k_m"), "of memory"),
        (("--width", "100000000", "--heads", "1", "--kv-heads", "1"), "would take"),
        (("--architecture", "qwen3", "--vocab", "4000000000"), "of memory"),
        (("--context", "1000000000000"), "--context is too large"),
        (("--architecture", "qwen3", "--set", "block_count=99999999999"), "does not fit 32 bits"),
    ],
)
def test_models_that_fit_nowhere_are_refused_before_they_are_begun(parity: Cli, shape: tuple[str, ...], message: str) -> None:
    """What would fill the disk, the memory or llama.cpp's tables is one line, and leaves no file."""
    refused(parity("synth", *shape, "-o", "m.gguf"), message)
    assert not list(Path().iterdir())


def contents_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("engine", ["false {out}", "true {out}", "echo hello"])
def test_a_failed_run_leaves_the_earlier_one(parity: Cli, tmp_path: Path, engine: str) -> None:
    """A run into the folder of another, whose engine fails, leaves all four files of that as they were."""
    assert parity("run", "--prompt", "hi", "-o", "r").code == 0
    before = contents_of(Path("r"))
    refused(parity("run", "--prompt", "ho", "-o", "r", "--exec", engine))
    assert contents_of(Path("r")) == before


def test_an_answer_never_stands_beside_other_dumps(parity: Cli, stories_run: Path) -> None:
    """A run whose dumps are whole and then not judged leaves these dumps, and no answer of the run before."""
    import json
    import shutil

    shutil.copytree(stories_run, "r")
    lines = [json.loads(line) for line in (stories_run / "ours.jsonl").read_text().splitlines()]
    for line in lines:
        if line["type"] == "checkpoint":
            line["stats"]["l2"] = 1e30  # which its own values contradict: lint calls the dump unusable
    Path("wrong.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = parity("run", "--prompt", "Once upon a time", "-o", "r", "--exec", "cp wrong.jsonl {out}")
    refused(ran, "your engine's dump")
    assert sorted(contents_of(Path("r"))) == ["ours.jsonl", "ref.jsonl"]
    assert (Path("r") / "ours.jsonl").read_bytes() == Path("wrong.jsonl").read_bytes()


def test_a_run_replaces_the_earlier_one_whole(parity: Cli, tmp_path: Path) -> None:
    """A second run into a folder leaves its own files only, whole tensors of the first and what a killed run left included."""
    assert parity("run", "--tokens", "5,6", "-o", "r", "--full").code == 0
    (Path("r") / ".parity-run-left").mkdir()
    (Path("r") / ".parity-run-left" / "ours.jsonl").write_text("half")
    (Path("r") / "mine.txt").write_text("mine")
    assert parity("run", "--tokens", "5,6", "-o", "r").code == 0
    assert sorted(contents_of(Path("r"))) == ["diff.json", "mine.txt", "ours.jsonl", "ref.jsonl", "report.html"]


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--tokens", "5", "--exec", "false {out}"),
        ("run", "--tokens", "5", "--exec", "false {out}", "-o", "new/folder"),
        ("run", "--tokens", "5", "--exec", "false {out} {points}", "--hunt", "-o", "new/folder"),
        ("run", "--tokens", "5", "--server", "http://127.0.0.1:9", "-o", "new/folder"),
        ("drift", "record", "--prompts", "prompts.txt", "--exec", "false {out}", "-o", "new/golden"),
        ("convert", "prompts.txt", "-o", "new/folder/dump.jsonl"),
    ],
)
def test_a_command_that_fails_leaves_no_folder(parity: Cli, words: tuple[str, ...]) -> None:
    """Folders that a command made for what it then could not write go with it."""
    Path("prompts.txt").write_text("Once upon a time\n")
    assert parity(*words).code == 2
    assert [path.name for path in Path().iterdir()] == ["prompts.txt"]


def test_runs_of_the_same_second_have_folders_of_their_own(parity: Cli) -> None:
    """Of several runs that are begun at once, as by a script, none replaces another's dumps."""
    with ExitStack() as stack:
        folders = [stack.enter_context(run_folder(Request(embedded.path()))) for _ in range(5)]
    assert len(set(folders)) == 5
