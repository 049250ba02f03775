"""A server as a side: real ones on loopback, right and with planted faults."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli import Cli, refused
from servers import Start

TEXT = "Lily and her mom went to the park."


def asked(parity: Cli, url: str, *more: object) -> tuple[int, dict[str, Any]]:
    """`parity run --server` of the text, four tokens chosen by the server."""
    return parity.json("run", "--prompt", TEXT, "--server", url, "--generate", 4, "--out", "folder", *more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "path", "echoed"), [("llama_cpp", "", True), ("xllamacpp", "", False), ("xllamacpp", "/completion", False)]
)
def test_a_right_server_agrees(serve: Start, stories: Path, parity: Cli, kind: str, path: str, echoed: bool) -> None:
    """Both schemas of /v1/completions and llama.cpp's own /completion: every prediction within the measured limit, and the same choices."""
    code, answer = asked(parity, serve(kind, stories) + path)
    assert (code, answer["verdict"], answer["echoed"]) == (0, "parity", echoed)
    assert answer["compared"] >= 12
    assert answer["api"] == ("llama.cpp" if path else "openai")
    assert 0 < max(item["kl"] for item in answer["predictions"]) < answer["limit"] / 5
    assert Path("folder/server.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fault", "cause", "words"),
    [
        ("llama_cpp", "bos", "bos-missing", "one token too early"),  # its echo without a BOS is off by one: a fault of its own
        ("xllamacpp", "bos", "bos-missing", "says that the prompt has 9 tokens"),
        ("llama_cpp", "template", "template", "<|im_start|>user"),
        ("llama_cpp", "template-hidden", "template", "chatml"),
        ("xllamacpp", "template", "template", "chatml"),
        ("llama_cpp", "temperature", "sampler", "although temperature 0 was requested"),
        ("xllamacpp", "temperature", "sampler", "although temperature 0 was requested"),
    ],
)
def test_a_planted_fault_is_named(
    serve: Start, stories: Path, without_bos: Path, parity: Cli, kind: str, fault: str, cause: str, words: str
) -> None:
    """A BOS that is left out, a chat template around the text, shown or hidden, and a sampler that is not greedy: each by its name."""
    url = serve(kind, without_bos if fault == "bos" else stories, "" if fault == "bos" else fault)
    code, answer = asked(parity, url)
    assert (code, [item["name"] for item in answer["causes"]]) == (1, [cause])
    assert words in answer["causes"][0]["sentence"]
    if answer["causes"][0]["kl"] is not None:
        assert answer["causes"][0]["kl"] < answer["limit"] < answer["causes"][0]["without"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama_cpp", "xllamacpp"])
def test_a_repeat_penalty_is_fitted(kind: str, serve: Start, stories: Path, parity: Cli) -> None:
    """The penalty that a server applies by itself explains each of its choices; asked for none, it has none."""
    url = serve(kind, stories, "penalty")
    text = "Lily and her mom went to the park. She saw a big red ball near the tree and wanted to play with it."
    code, answer = parity.json("run", "--prompt", text, "--server", url, "--generate", 16, "--out", "folder")
    assert (code, answer["first_divergence"]) == (1, None)
    assert answer["causes"][0]["name"] == "repeat-penalty"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "cause", "words"),
    [
        ({"repeat_penalty": 1.3}, "repeat-penalty", "a repeat penalty of 1.3"),
        ({"presence_penalty": 0.5}, "penalties", "0.5 (presence penalty)"),
        ({"frequency_penalty": 0.5}, "penalties", "0.5 for each occurrence"),
        ({"min_p": 0.05}, "truncated-logprobs", "after a min-p of 0.05"),
        ({"top_n_sigma": 1.0}, "truncated-logprobs", "after a top-n-sigma of 1"),
        ({"typical_p": 0.6}, "truncated-logprobs", "after a typical-p of 0."),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.1}, "truncated-logprobs", "after an XTC threshold of 0."),
    ],
)
def test_a_sampler_before_the_probabilities_is_named(
    settings: dict[str, float], cause: str, words: str, serve: Start, stories: Path, parity: Cli
) -> None:
    """llama.cpp's own server gives probabilities after its sampler: which one it is, and its number, are named."""
    text = "Lily had a big red ball. One day the dog took the ball and ran away with the ball. Lily was sad. Lily said"
    extra = {"post_sampling_probs": True, "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0} | settings
    url = f"{serve('xllamacpp', stories)}/completion"
    more = ("--server-top", 20, "--server-json", json.dumps(extra), "--generate", 2, "--out", "folder")
    code, answer = parity.json("run", "--prompt", text, "--server", url, *more)
    assert (code, [item["name"] for item in answer["causes"]]) == (1, [cause]), answer["causes"]
    assert words in answer["causes"][0]["sentence"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "cause", "words"),
    [
        ("log10", "log-base", "to the base 10"),
        ("log2", "log-base", "to the base 2"),
        ("logits", "logits", "the sum of their exponentials is not subtracted"),
        ("unsettled", "not-normalised", "plus a constant"),
        ("sign", "log-sign", "sign is wrong"),
        ("probabilities", "probabilities", "not their logarithms"),
        ("scaled", "log-scale", "times llama.cpp's, with no new normalisation"),
        ("heated", "temperature", "divided by a temperature of 0.7"),
        ("top-3", "truncated-logprobs", "after a top-k of 3"),
    ],
)
def test_numbers_that_are_no_log_probabilities_are_named(
    serve: Start, stories: Path, parity: Cli, fault: str, cause: str, words: str
) -> None:
    """Another base, sign, scale or sum, logits, probabilities, a sampler in front: what the server gives is named, by a real server's
    numbers.
    """
    code, answer = asked(parity, serve("llama_cpp", stories, fault))
    assert (code, [item["name"] for item in answer["causes"]]) == (1, [cause])
    assert words in answer["causes"][0]["sentence"]
    # Which token is the last of three may differ in the server's own arithmetic.
    assert answer["causes"][0]["kl"] < answer["causes"][0]["without"] / 10 > answer["limit"] / 10


@pytest.mark.slow
def test_a_server_that_stops_early_says_how_much_was_compared(serve: Start, stories: Path, parity: Cli) -> None:
    """Fewer chosen tokens than asked for are a note and part of the verdict, with llama.cpp's next token."""
    text = "Lily and her mom went to the park."
    url, stop = serve("llama_cpp", stories), '{"stop": [" big"]}'
    ran = parity("run", "--prompt", text, "--server", url, "--generate", 12, "--server-json", stop, "--out", "folder")
    assert ran.code == 0
    assert "the server chose 4 of the 12 tokens that it was asked for, and says 'stop'; llama.cpp would go on with" in ran.out
    assert "; the server chose 4 of 12 tokens" in ran.out


@pytest.mark.slow
def test_the_prefix_is_dumped(serve: Start, without_bos: Path, parity: Cli) -> None:
    """--dump-prefix records llama.cpp on exactly the tokens up to the first wrong prediction, as the printed command does."""
    code, answer = asked(parity, serve("xllamacpp", without_bos), "--dump-prefix")
    assert code == 1
    header = json.loads(Path("folder/ref.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert header["tokens"] == answer["prefix"] == answer["tokens"][: answer["first_divergence"]["position"] + 1]
    assert f"--tokens {','.join(map(str, answer['prefix']))}" in answer["next_command"]


@pytest.mark.slow
def test_a_server_without_logprobs_says_what_to_do(serve: Start, stories: Path, parity: Cli) -> None:
    """llama-cpp-python's server keeps no logits unless it is told to: its own words, and the option."""
    ran = parity("run", "--prompt", TEXT, "--server", serve("llama_cpp", stories, "no-logprobs"))
    refused(ran, "logits_all=False", "--logits_all true")
