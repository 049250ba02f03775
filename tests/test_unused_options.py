"""Options that nothing would read in the way a command is used are refused, not ignored."""

from pathlib import Path

import pytest
from cli import Cli, refused

CASES = [
    (("diff", "{dump}", "{dump}", "--arbiter", "all"), "--arbiter needs the model"),
    (("diff", "{dump}", "{dump}", "{dump}", "--arbiter", "off"), "--arbiter needs the model"),
    (("diff", "{dump}", "{dump}", "{dump}", "--include", "{dump}"), "--include needs exactly two dumps"),
    (("diff", "{dump}", "{dump}", "{dump}", "--strict"), "--strict needs exactly two dumps"),
    (("diff", "{dump}", "{dump}", "--include", "{dump}", "--format", "github"), "--include is not part of --format github"),
    (("run", "--prompt", "a", "--python", "python3"), "Add --with hf"),
    (("run", "--prompt", "a", "--hf-device", "cuda"), "Add --with hf"),
    (("run", "--prompt", "a", "--points", "all", "--layers", "0"), "--layers chooses among the default points"),
    (("run", "--prompt", "a", "--exec", "true {out}", "--devices", "0"), "--devices is for the engine that comes with parity"),
    (("run", "--prompt", "a", "--exec", "true {out}", "--bisect", "--arbiter", "all"), "--arbiter has no effect with --bisect"),
    (("run", "--prompt", "a", "--server", "http://127.0.0.1:1", "--compute", "f16"), "--compute has no effect with --server"),
    (("run", "--prompt", "a", "--server", "http://127.0.0.1:1", "--points", "all"), "Add --dump-prefix"),
    (("run", "--prompt", "a", "--mode", "native", "--window", "2"), "--window works in exact mode only"),
    (("dump", "ours", "--prompt", "a", "--points", "embd", "--layers", "0", "-o", "x"), "--layers chooses"),
    (("dump", "ref", "--prompt", "a", "--offset", "1", "-o", "x"), "--offset is for the dump that --follow names"),
    (("dump", "ref", "--follow", "{dump}", "--points", "all", "-o", "x"), "--points is what --follow takes"),
    (("explain", "--list", "--budget", "3"), "--budget has no effect with --list"),
    (("isolate", "{dump}", "--generate", "1"), "--generate is for llama.cpp's own operations"),
    (("isolate", "--prompt", "a", "--compute", "f32"), "--compute is for a dump"),
    (("weights", "--theirs", "{dump}", "--backend", "numpy"), "--backend chooses where"),
    (("consistency", "{dump}", "{dump}", "--chunk", "3"), "--chunk has no effect on two dumps"),
    (("consistency", "--prompt", "a b", "--compute", "f16"), "--compute is for an engine of yours"),
    (("conform", "--side", "ours", "--python", "python3"), "Add --side hf"),
    (("conform", "--exec", "true {out}", "--backend", "numpy"), "Add --side ours"),
    (("score", "--text", "{dump}", "--compute", "f16"), "--compute is for an engine of yours"),
    (("score", "--text", "{dump}", "--exec", "true", "--backend", "numpy"), "--backend is for the engine that comes with"),
    (("drift", "record", "--prompts", "{dump}", "--out", "x", "--backend", "numpy"), "Add --side ours"),
    (("drift", "check", "x", "--ours", "{dump}", "--threads", "2"), "--threads has no effect on dumps"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[" ".join(words[:2]) for words, _ in CASES])
def test_an_option_that_nothing_reads_is_one_line(
    parity: Cli, stories_run: Path, arguments: tuple[str, ...], message: str
) -> None:
    """Exit 2 and a sentence that names the option and what it needs; nothing is computed or written."""
    dump = str(stories_run / "ours.jsonl")
    ran = parity(*(word.replace("{dump}", dump) for word in arguments))
    if "--format" in arguments:
        assert (ran.code, ran.out) == (2, "") or message in ran.out
    else:
        refused(ran, message)
    assert not Path("x").exists()


def test_options_of_what_comes_after_are_not_refused(parity: Cli, stories_run: Path) -> None:
    """--dump-prefix records the points that are named, and --explain-worst needs our engine for the cause: both reach the next error."""
    dump = stories_run / "ours.jsonl"
    refused(parity("run", "--prompt", "a", "--server", "http://127.0.0.1:1", "--dump-prefix", "--points", "all"), "127.0.0.1:1")
    words = ("--exec", "no-such-program {tokens}", "--explain-worst", "--backend", "numpy")
    refused(parity("score", "--text", dump, *words, "--context", 2), "--context 2 is too small")


def test_what_a_variable_sets_is_not_refused(parity: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """$PARITY_HF_PYTHON may stay set for commands that do not need it."""
    monkeypatch.setenv("PARITY_HF_PYTHON", "python3")
    assert parity("run", "--prompt", "a", "--points", "embd", "--out", "folder").code == 0
