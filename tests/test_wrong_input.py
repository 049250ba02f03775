"""Hostile input is normal input: one clear line, exit 2, nothing lost, no traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from changed_files import File
from cli import Cli, refused
from gguf_writing import finish

from checkpoints.jsonl import Writer
from checkpoints.record import Header, ModelInfo
from checkpoints.summary import summarise
from parity.models import embedded as default_model

ONCE = ("--prompt", "Once upon a time")


@pytest.fixture
def damaged(stories: Path, tmp_path: Path) -> Callable[[str, Callable[[bytes], bytes]], Path]:
    """A function that writes the stories model with its bytes changed."""

    def make(name: str, change: Callable[[bytes], bytes]) -> Path:
        path = tmp_path / name
        path.write_bytes(change(stories.read_bytes()))
        return path

    return make


def test_no_such_model(parity: Cli) -> None:
    """A model that is not there is named."""
    refused(parity("run", "--model", "nowhere.gguf", *ONCE), "nowhere.gguf", "No such file")


def test_a_folder_is_no_model(parity: Cli, tmp_path: Path) -> None:
    """A folder given as the model is said to be one."""
    refused(parity("run", "--model", tmp_path, *ONCE), "is a folder")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"PK\x03\x04zip", "begins with 50 4b 03 04, not "), (b"GGU", "is not a GGUF")]
)
def test_not_a_gguf(parity: Cli, tmp_path: Path, content: bytes, message: str) -> None:
    """A file of another kind is refused with its first bytes."""
    (tmp_path / "m.gguf").write_bytes(content)
    refused(parity("run", "--model", "m.gguf", *ONCE), message)


@pytest.mark.parametrize("size", [20, 1000, 60_000, 200_000, 15_000_000])
def test_a_truncated_gguf(parity: Cli, damaged: Callable[..., Path], size: int) -> None:
    """A file that was cut short, in header, vocabulary or weights, is said to be damaged or cut short."""
    ran = parity("run", "--model", damaged("cut.gguf", lambda data: data[:size]), *ONCE)
    refused(ran)
    assert "cut short" in ran.err or "damaged" in ran.err


def test_another_architecture_is_refused_by_name(parity: Cli, damaged: Callable[..., Path]) -> None:
    """An architecture that llama.cpp does not know is named by it: there is no graph to compute from."""
    model = damaged("other.gguf", lambda data: data.replace(b"qwen2", b"falco"))
    refused(parity("run", "--model", model, *ONCE), "unknown model architecture: 'falco'", "--verbose")


def test_a_model_without_tensors(parity: Cli, stories: Path, tmp_path: Path) -> None:
    """A vocabulary-only file can tokenize, not compute, and the line says so."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "qwen2")
    for name in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count", "head_count_kv"):
        getattr(writer, f"add_{name}")(2)
    finish(writer)
    refused(parity("run", "--model", "vocab.gguf", "--tokens", "1,2"), "no tensors", "model file with weights")


def test_a_model_without_a_tokenizer_takes_ids_only(parity: Cli, tmp_path: Path) -> None:
    """A stub vocabulary cannot tokenize a prompt; the same model runs with --tokens."""
    assert parity("synth", "--stub-vocabulary", "-o", "stub.gguf").code == 0
    ran = parity("run", "--model", "stub.gguf", *ONCE)
    refused(ran, "tokenizer")
    assert parity("run", "--model", "stub.gguf", "--tokens", "1,2,3").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        ((), "no prompt was given"),
        (("--prompt", "a", "--tokens", "1"), "more than one prompt"),
        (("--tokens", "5,2048"), "token id 2048 is outside the vocabulary"),
        (("--tokens", "-1"), "token id -1 is outside"),
        (("--tokens", "a,b"), "--tokens must be whole numbers"),
        (("--tokens", "1_0"), "--tokens must be whole numbers separated by commas, not '1_0'"),
        (("--tokens", "1" * 5000), "--tokens must be whole numbers"),
        (("--tokens", ",".join(["1"] * 513)), "513 positions are more than the model's context of 512"),
        (("--prompt", "a", "--points", "blk.99.q"), "there is no point 'blk.99.q'"),
        (("--prompt", "a", "--points", "blk.{1"), "unbalanced braces"),
        (("--prompt", "a", "--layers", "0,99"), "99"),
        (("--prompt", "a", "--positions", "x"), "--positions"),
        (("--prompt", "a", "--positions", "9" * 19), "--positions '9999999999999999999' is not valid"),
        (("--prompt", "a", "--positions", "900"), "position"),
        (("--prompt", "a", "--window", "0"), "--window"),
        (("--prompt", "a", "--window", "²"), "--window"),  # a digit to str.isdigit, none to int
        (("--prompt", "a", "--window", "9" * 5000), "--window"),  # more digits than int takes
        (("--prompt", "a", "--backend", "cupy"), "upy"),
        (("--prompt-file", "nofile.txt"), "nofile.txt"),
        (("--prompt", "a", "--exec", "'"), "--exec"),
        (("--prompt", "a", "--exec", "no-such-engine {out}"), "cannot run no-such-engine"),
        (("--prompt", "a", "--exec", "false {out}"), "failed with exit code 1"),
        (("--prompt", "a", "--exec", "true {out}"), "did not write"),
        (("--prompt", "a", "--exec", "echo hello"), "no checkpoint record"),
        (("--prompt", "a", "--no-such-option",), "--no-such-option"),
        (("--prompt", "a", "--slice", "0"), "--slice"),
        (("--prompt", "a", "--slice", "9" * 20), "--slice"),
        (("--prompt", "a", "--threads", "100000"), "--threads"),
        (("--prompt", "a", "--tolerance", "inf"), "--tolerance"),
        (("--prompt", "a", "--tolerance", "nan"), "--tolerance"),
    ],
)  # fmt: skip
def test_wrong_requests(parity: Cli, arguments: tuple[str, ...], message: str) -> None:
    """Each wrong request is one line that names what is wrong with it."""
    refused(parity("run", *arguments), message)


@pytest.mark.parametrize(
    "command",
    [
        ("run", "--tokens", "5", "--out", ""),
        ("run", "--tokens", "5", "--devices="),
        ("dump", "ref", "--tokens", "5", "-o", ""),
        ("lint", ""),
        ("diff", "ours.jsonl", ""),
        ("explain", "ours.jsonl", "--model", "", "--format", "text"),
        ("drift", "check", "golden", "--ours", "ours.jsonl", "--ours", ""),
        ("synth", "-o", "m.gguf", "--like", ""),
    ],
)
def test_an_unset_variable_is_not_this_folder_or_a_default(parity: Cli, command: tuple[str, ...]) -> None:
    """An empty text for a path or a word is an error that names the option, and nothing is read or written in its place."""
    refused(parity(*command), "is empty. Is a variable unset?")


def test_an_unwritable_folder(parity: Cli, tmp_path: Path) -> None:
    """An output folder that cannot be made is named before anything is computed."""
    (tmp_path / "file").write_text("")
    refused(parity("run", *ONCE, "--out", "file/runs"), "cannot write to file/runs")


def test_an_error_as_json(parity: Cli) -> None:
    """With --format json an error is one JSON object on stdout with code, message and advice, and exit 2."""
    code, answer = parity.json("run", "--model", "nowhere.gguf", *ONCE)
    assert code == 2
    assert answer["schema"] == 1
    assert set(answer["error"]) == {"code", "message", "advice"}


HEADER = Header(
    "engine", ModelInfo("m", "qwen2", "F32", 2, "f" * 32), tokens=(1, 2, 3), prompt="abc", mode="exact", compute="f32"
)


def write(path: str, header: Header | None = HEADER, point: str = "embd", seed: int = 0, **changes: object) -> Path:
    rows = np.random.default_rng(seed).standard_normal((3, 32)).astype(np.float32)
    with Writer(path, header) as writer:
        writer.rows(summarise(point, rows, np.arange(3)))
    text = Path(path).read_text()
    for old, new in changes.items():
        text = text.replace(f'"{old}"', str(new))
    Path(path).write_text(text)
    return Path(path)


BAD_DUMPS = {
    "empty": (b"", "is empty"),
    "not-json": (b"hello\nworld\n", "no checkpoint record in 2 lines"),
    "binary": (bytes(range(256)) * 40, "no checkpoint record"),
    "array": (b"[1,2,3]\n", "no checkpoint record"),
    "newer": (b'{"type":"header","format":2}\n', "format 2 is newer"),
    "shape": (b'{"checkpoint":"embd","token_idx":0,"shape":[2],"values":[1,2,3]}\n', "3 values, more than its shape [2]"),
    "position": (b'{"checkpoint":"embd","token_idx":-1,"values":[1]}\n', "token_idx"),
    "words": (b'{"checkpoint":"embd","token_idx":0,"values":["one"]}\n', "line 1"),
    "nested": (b'{"checkpoint":"embd","token_idx":0,"values":[[1]]}\n', "is not a number"),
    "null-name": (b'{"checkpoint":null,"token_idx":0,"values":[1]}\n', "line 1"),
}


@pytest.mark.parametrize("name", BAD_DUMPS)
def test_bad_dumps(parity: Cli, tmp_path: Path, name: str) -> None:
    """Each unreadable dump is one line that names the file and, where there is one, the line."""
    content, message = BAD_DUMPS[name]
    (tmp_path / "bad.jsonl").write_bytes(content)
    refused(parity("diff", "bad.jsonl", write("good.jsonl")), "bad.jsonl", message)


def test_two_prompts_are_two_experiments(parity: Cli) -> None:
    """Dumps of different prompts are refused: nothing can be said of them."""
    from msgspec.structs import replace

    refused(parity("diff", write("a.jsonl"), write("b.jsonl", replace(HEADER, prompt="xyz", tokens=(4, 5, 6)))), "prompt")


def test_two_models_are_two_experiments(parity: Cli) -> None:
    """Dumps of different models are refused by name."""
    from msgspec.structs import replace

    other = replace(HEADER, model=ModelInfo("other", "qwen2", "F32", 2, "0" * 32))
    refused(parity("diff", write("a.jsonl"), write("b.jsonl", other)), "other")


@pytest.mark.parametrize("command", [("lint",), ("isolate",), ("explain",), ("dump", "ref", "-o", "x.jsonl", "--follow")])
def test_a_dump_is_not_judged_by_another_model(
    parity: Cli, stories_run: Path, synthetic: Callable[..., Path], command: object
) -> None:
    """Commands that hold a dump to a model file refuse another model's by name, rather than accuse the dump."""
    ran = parity(*command, stories_run / "ours.jsonl", "--model", synthetic())  # type: ignore[misc]
    refused(ran, "stories-14m Q8_0")


def test_a_file_with_other_numbers_is_said_to_be_one(parity: Cli, synthetic: Callable[..., Path]) -> None:
    """A file of the same name, architecture and layers whose epsilon differs: `isolate` and `diff` say so."""
    model = synthetic(layers=2)
    changed = File(model)
    changed.set("attention.layer_norm_rms_epsilon", 1e-5)
    changed.write(Path("other.gguf"))
    dump = ("dump", "ours", "--model", model, "--tokens", "5,6", "--points", "all", "--slice", "4096", "-o", "right.jsonl")
    assert parity(*dump).code == 0
    said = "was made with a file whose metadata differ from other.gguf's"
    assert said in parity.json("isolate", "right.jsonl", "--model", "other.gguf")[1]["facts"]["metadata"]
    assert said not in parity("isolate", "right.jsonl", "--model", synthetic(layers=2, kind="q8_0"), "--mode", "exact").out
    _, answer = parity.json("diff", "right.jsonl", "right.jsonl", "--model", "other.gguf")
    assert any(said in note for note in answer["notes"])


def test_a_dump_of_the_twin_is_the_models(parity: Cli) -> None:
    """A dump of the F32 twin is linted against and explained by the file that it was made of; lint warns that it is another file."""
    assert parity("twin", default_model.path(), "-o", "twin.gguf").code == 0
    assert parity("dump", "ours", "--model", "twin.gguf", "--tokens", "2047,430", "-o", "ours.jsonl").code == 0
    _, answer = parity.json("lint", "ours.jsonl", "--model", default_model.path())
    assert (answer["usable"], [finding["rule"] for finding in answer["findings"]]) == (True, ["hparams"])
    explained = parity("explain", "ours.jsonl", "--model", default_model.path())
    assert (explained.code, explained.out[:8]) == (0, "no fault")


def test_nan_on_both_sides_is_no_agreement(parity: Cli) -> None:
    """Records that have nothing but NaN on both sides agree with nothing: a divergence that says that the reference is not finite."""
    line = '{"checkpoint":"%s","token_idx":0,"values":[%s]}\n'
    Path("nan.jsonl").write_text(line % ("embd", "1,2,3,4.5") + line % ("logits", "NaN,NaN,NaN"))
    code, answer = parity.json("diff", "nan.jsonl", "nan.jsonl")
    assert (code, answer["compared"], answer["first_divergence"]["checkpoint"]) == (1, 2, "logits")
    assert "the reference is not finite here" in answer["pattern"]["sentence"]
    Path("nan.jsonl").write_text(line % ("logits", "NaN,NaN,NaN"))
    assert parity.json("diff", "nan.jsonl", "nan.jsonl")[0] == 1


def test_nothing_in_common_is_never_parity(parity: Cli) -> None:
    """Two dumps without a common point exit 2 with the reason."""
    refused(parity("diff", write("a.jsonl"), write("b.jsonl", point="output_norm")), "embd", "output_norm")


def test_records_that_contradict_each_other(parity: Cli, tmp_path: Path) -> None:
    """Two records of one key with different values are an error that lists the steps; --step chooses; equal ones merge."""
    good = write("good.jsonl")
    lines = good.read_text().splitlines()
    again = [line.replace('"step":0', '"step":4') for line in lines if '"checkpoint":"embd"' in line]
    (tmp_path / "equal.jsonl").write_text("\n".join([*lines[:-1], *again]) + "\n")
    assert parity("diff", "equal.jsonl", good).code == 0
    other = [
        line.replace('"step":0', '"step":4') for line in write("o.jsonl", seed=1).read_text().splitlines() if '"embd"' in line
    ]
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines[:-1], *other]) + "\n")
    refused(parity("diff", "twice.jsonl", good), "0", "4", "--step")
    assert parity("diff", "twice.jsonl", good, "--step", "0").code == 0
    assert parity("diff", "twice.jsonl", good, "--step", "4").code == 1


def test_nan_is_a_divergence_and_no_crash(parity: Cli, tmp_path: Path) -> None:
    """NaN and infinities written as strings are read; on one side only they are a divergence."""
    good = write("good.jsonl")
    lines = [json.loads(line) for line in good.read_text().splitlines()]
    lines[1]["values"][2] = "NaN"
    lines[1]["stats"]["nonfinite"] = 1
    (tmp_path / "nan.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    code, answer = parity.json("diff", "nan.jsonl", good)
    assert code == 1
    assert answer["first_divergence"]["checkpoint"] == "embd"
    assert answer["first_divergence"]["ours"][2] == "NaN"


def test_a_dump_that_was_cut_short_is_used_as_far_as_it_goes(parity: Cli, tmp_path: Path) -> None:
    """A dump cut in mid-line is compared up to its last whole line, and the answer says that it was cut."""
    good = write("good.jsonl")
    data = good.read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(data[: int(len(data) * 0.6)])
    ran = parity("diff", "cut.jsonl", good)
    assert ran.code == 0
    assert "cut short" in ran.out
    assert parity("diff", "cut.jsonl", good, "--strict").code == 1
