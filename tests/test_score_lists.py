"""`parity score` of sides that are no whole rows of logits: servers, golden folders; and the bounds of what lists say."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, refused
from msgspec.structs import replace
from servers import Start

from parity.commands import score_output
from parity.run.request import Request
from parity.score.measures import Listed, kl_of_list, kl_of_lists, kl_whole, largest, log_sum
from parity.score.predictions import LlamaCppPredictions, Rows
from parity.score.score import ScoreRequest, score
from parity.score.text import Chunk
from parity.server.scoring import text_of
from reference.client import Reference

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One day, she found a big red "
    "ball in the park and took it home to her mom."
)


@pytest.fixture
def words(tmp_path: Path) -> tuple[object, ...]:
    """The command over two chunks of the text."""
    (tmp_path / "text.txt").write_text(TEXT)
    return "score", "--text", tmp_path / "text.txt", "--context", 16, "--chunks", 2


def test_lists_bound_the_divergence_from_below() -> None:
    """KL of two lists of different tokens is no more than that of a list and a row, and that no more than the whole one."""
    rng = np.random.default_rng(7)
    for kept in (4, 50, 300):
        base, ours = (rng.standard_normal(300).astype(np.float32) * 4 for _ in range(2))
        p, q = (
            Listed(ids := largest(row, kept), row[ids].astype(np.float64) - log_sum(row)) for row in (base, ours)
        )  # fmt: skip
        both, left = kl_of_lists(p, q)
        single, unseen = kl_of_list(p, ours)
        assert both <= single + 1e-9
        assert single <= kl_whole(base, ours) + 1e-9
        assert left >= unseen - 1e-12
        outside = np.setdiff1d(np.arange(300), q.ids)
        assert all(ours[token] - log_sum(ours) <= q.most_of_others + 1e-9 for token in outside)


@pytest.mark.slow
def test_a_server_is_scored(parity: Cli, serve: Start, stories: Path, words: tuple[object, ...]) -> None:
    """llama-cpp-python's server echoes, llama.cpp's own is asked for each position: perplexity, KL within the whole one, first choices."""
    _, whole = parity.json(*words, "--side", "ref", "--mode", "native")
    _, echoed = parity.json(*words, "--server", serve("llama_cpp", stories), "--server-top", 100)
    _, asked = parity.json(*words, "--server", serve("xllamacpp", stories) + "/completion")
    assert [answer["positions"] for answer in (whole, echoed, asked)] == [14, 14, 14]
    assert echoed["perplexity"]["base"] == asked["perplexity"]["base"] == pytest.approx(whole["perplexity"]["base"])
    assert echoed["perplexity"]["ours"] == pytest.approx(whole["perplexity"]["ours"], rel=1e-2)
    assert (echoed["perplexity"]["bounded"], asked["perplexity"]["bounded"] > 0) == (0, True)
    assert asked["perplexity"]["ours"] < asked["perplexity"]["base"]  # the least that it can be
    for answer in (echoed, asked):  # an F16 cache besides: the order of magnitude is the whole row's
        assert answer["same_top"] == 1.0
        assert answer["kl"]["exact"] is False
        assert 0 < answer["kl"]["mean"] < 5 * whole["kl"]["mean"]
        assert answer["worst"]["kl"] == answer["kl"]["max"]
    assert echoed["kl"]["unseen"] < asked["kl"]["unseen"] < 1


@pytest.mark.slow
def test_the_worst_token_of_a_server_leads_to_its_fault(
    parity: Cli, serve: Start, without_bos: Path, words: tuple[object, ...]
) -> None:
    """A server that forgets the BOS: the figures are far off, and the cause has a name, in JSON and in the block to paste."""
    url = serve("llama_cpp", without_bos)
    code, answer = parity.json(*words, "--server", url, "--explain-worst")
    assert (code, answer["kl"]["mean"] > 0.01) == (1, True)
    assert [cause["name"] for cause in answer["explained"]["causes"]] == ["bos-missing"]
    assert "cause: `bos-missing`." in parity(*words, "--server", url, "--explain-worst", "--format", "markdown").out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("log10", "log-base"),
        ("heated", "temperature"),
        ("unsettled", "not-normalised"),
        ("template-hidden", "template"),
        ("bias", "logit-bias"),
    ],
)
def test_a_score_names_the_causes_that_a_run_names(
    fault: str, cause: str, parity: Cli, serve: Start, stories: Path, tmp_path: Path
) -> None:
    """Without --explain-worst: what explains the first predictions of the text, in JSON and in the block to paste."""
    (tmp_path / "text.txt").write_text(TEXT)
    command = ("score", "--text", tmp_path / "text.txt", "--context", 40, "--server", serve("llama_cpp", stories, fault))
    code, answer = parity.json(*command)
    assert (code, [item["name"] for item in answer["causes"]]) == (0, [cause])
    assert f"Cause: `{cause}`" in parity(*command, "--format", "markdown").out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "sentence"), [("logits", "the numbers are logits"), ("probabilities", "not their logarithms")]
)
def test_numbers_that_cannot_be_scored_are_named(
    fault: str, sentence: str, parity: Cli, serve: Start, stories: Path, words: tuple[object, ...]
) -> None:
    """Where they are no logarithms at all the refusal says what they are."""
    refused(parity(*words, "--server", serve("llama_cpp", stories, fault)), sentence)


@pytest.mark.slow
def test_servers_that_cannot_be_scored(parity: Cli, serve: Start, stories: Path, words: tuple[object, ...]) -> None:
    """One without log-probabilities, and one that shows a template in its echo."""
    refused(parity(*words, "--server", serve("llama_cpp", stories, "no-logprobs")), "logits_all")
    refused(parity(*words, "--server", serve("llama_cpp", stories, "template")), "chat template")


def answering(tops: dict[str, float]) -> type[http.server.BaseHTTPRequestHandler]:
    """A server that says the same of every position, whatever it is asked; on /completion with ids from 5 on."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Silence."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            logprobs = {"tokens": [" the"], "token_logprobs": [-0.5], "top_logprobs": [tops]}
            listed = [{"id": 500 + n, "token": text, "logprob": value} for n, (text, value) in enumerate(tops.items())]
            reply = {"choices": [{"text": " the", "logprobs": logprobs}]}
            if self.path.endswith("/completion"):
                reply = {"completion_probabilities": [{"id": 5, "token": " the", "logprob": -0.5, "top_logprobs": listed}]}
            body = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@pytest.fixture
def fixed(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a server with the given candidates."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), answering(request.param))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


FEW = {" the": -0.7, " a": -0.9}
STRANGE = {"Ωmega": -0.7, "日本語日本語": -0.9, "zzyzx": -2.0, "qqq": -3.0, "xyzzy!": -4.0}


@pytest.mark.parametrize(
    ("fixed", "message", "advice"),
    [
        pytest.param(FEW, "gives 2 candidates per position, not the 5 asked for", "--server-top 2", marks=pytest.mark.slow),
        (STRANGE, "candidates are not tokens of this model", "Is it the model that the server runs?"),
        pytest.param({}, "nothing was predicted that could be scored", "longer text", marks=pytest.mark.slow),
    ],
    indirect=["fixed"],
)
def test_lists_that_cannot_be_used(parity: Cli, fixed: str, words: tuple[object, ...], message: str, advice: str) -> None:
    """Fewer candidates than asked for, and those of another model, by text or by id, are one line and exit 2."""
    for path in ("", "/completion"):
        refused(parity(*words, "--server", fixed + path), message, advice)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [FEW], indirect=True)
def test_a_server_is_no_base_file(parity: Cli, fixed: str, words: tuple[object, ...]) -> None:
    """Two sides, a base file of lists, and options without their server are refused; two candidates where two are asked for are scored."""
    refused(parity(*words, "--server", fixed, "--side", "ref"), "more than one side")
    refused(parity(*words, "--server", fixed, "--save-base", "x.base"), "--save-base needs whole rows")
    refused(parity(*words, "--server-top", 3), "need a server")
    code, answer = parity.json(*words, "--server", fixed, "--server-top", 2)
    assert (code, answer["top_k"], answer["perplexity"]["bounded"] > 0) == (0, None, True)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [FEW], indirect=True)
def test_requests_within_a_chunk_are_counted_on_a_terminal(
    parity: Cli, fixed: str, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not echo gets a request for each position: a terminal shows which one is under way, other streams nothing."""
    command = (*words, "--server", fixed, "--server-top", 2)
    assert parity(*command).err == ""
    monkeypatch.setattr(score_output, "on_terminal", lambda: True)
    shown = parity(*command).err
    assert [shown.count(f"request {number} of 7 ") for number in (0, 6, 7)] == [2, 2, 0]
    assert shown.count("chunk ") == 2
    assert shown.endswith("\n")


class OneTokenLess:
    """llama.cpp as a side that reads the first chunk without one of its tokens, as the text of a chunk alone may have fewer."""

    name = "reader"
    notes: tuple[str, ...] = ()

    def __init__(self, reference: Reference, model: Path) -> None:
        self._side = LlamaCppPredictions(reference, model, "exact", self.name)

    def read(self, chunk: Chunk) -> Chunk:
        """Without the second token, in the first chunk only."""
        return replace(chunk, tokens=(chunk.tokens[0], *chunk.tokens[2:])) if chunk.number == 0 else chunk

    def cause(self) -> None:
        """Nothing is looked for."""

    def rows(self, chunk: Chunk) -> Rows:
        """llama.cpp's."""
        return self._side.rows(chunk)


@pytest.mark.slow
def test_other_tokens_are_never_held_against_recorded_predictions(stories: Path, tmp_path: Path) -> None:
    """A chunk that is read as other tokens is left out beside a base file, and its neighbours keep their rows; llama.cpp computes it."""
    (tmp_path / "text.txt").write_text(TEXT)
    base = tmp_path / "text.base"
    of = ScoreRequest(Request(model=stories), tmp_path / "text.txt", "ref", context=16)
    whole, _ = score(replace(of, save_base=base, alone=True))
    other = replace(of, opened=lambda reference, _: OneTokenLess(reference, stories))
    beside_file, _ = score(replace(other, base=base))
    computed, _ = score(other)
    assert beside_file.positions == whole.positions - 7
    assert computed.positions == whole.positions - 1
    for answer in (beside_file, computed):
        assert answer.kl_max is not None
        assert answer.kl_max < 1e-6
        assert answer.base_perplexity == pytest.approx(answer.perplexity)
        assert "other tokens alone" in answer.notes[0]
    assert "left out" in beside_file.notes[0]


def test_impossible_tokens_and_broken_rows() -> None:
    """A token that the base excludes adds nothing, one that only the side excludes makes KL infinite; a broken row has no log-sum."""
    base, ours = (np.array(row, dtype=np.float32) for row in ([1, 2, -np.inf, 0], [1, 2, 3, 0]))
    expected = kl_whole(base[[0, 1, 3]], ours[[0, 1, 3]]) + log_sum(ours) - log_sum(ours[[0, 1, 3]])
    assert kl_whole(base, ours) == pytest.approx(expected)
    assert kl_whole(ours, base) == np.inf
    assert np.isnan(log_sum(np.array([1, np.nan], dtype=np.float32)))
    assert log_sum(np.array([1, np.inf], dtype=np.float32)) == np.inf
    assert log_sum(np.array([-np.inf, -np.inf], dtype=np.float32)) == -np.inf


@pytest.mark.slow
def test_logits_that_are_not_numbers_are_the_worst_position(parity: Cli, tmp_path: Path) -> None:
    """Of golden dumps with a NaN the other positions are scored, the first such position is the worst, and JSON stays JSON."""
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    assert parity("drift", "record", "--prompts", "prompts.txt", "-o", "g", "--points", "logits", "--slice", 2048).code == 0
    lines = [json.loads(line) for line in Path("g/000.jsonl").read_text().splitlines()]
    wrong = next(line for line in lines if line.get("token_idx") == 2 and "values" in line)
    wrong["values"][7] = "NaN"
    Path("g/000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = parity("score", "--golden", "g", "--format", "json")
    answer = json.loads(ran.out, parse_constant=pytest.fail)
    assert (ran.code, answer["positions"], answer["worst"]["position"], answer["worst"]["kl"]) == (0, 4, 2, "Infinity")
    assert "position 2 of chunk 0" in answer["notes"][0]


@pytest.mark.slow
def test_golden_logits_are_a_base(parity: Cli, tmp_path: Path) -> None:
    """Our engine on golden prompts is at rounding at every position; dumps without whole rows of logits are one line."""
    (tmp_path / "prompts.txt").write_text("Once upon a time\nLily\n")
    record = ("drift", "record", "--prompts", "prompts.txt")
    assert parity(*record, "-o", "golden", "--points", "logits", "--slice", 2048, "--generate", 2).code == 0
    assert parity(*record, "-o", "short").code == 0
    assert parity(*record, "-o", "none", "--points", "embd").code == 0
    code, answer = parity.json("score", "--golden", "golden")
    assert (code, answer["positions"], answer["same_top"], answer["kl"]["max"] < 1e-8) == (0, 9, 1.0, True)
    assert "2 prompts, 9 predictions (every position)" in parity("score", "--golden", "golden").out
    refused(parity("score", "--golden", "short"), "has 16 of 2,048 logits at position 0", "--points logits --slice 2048")
    refused(parity("score", "--golden", "none"), "has no logits for position 0", "--points logits --slice 2048")
    refused(parity("score", "--golden", "nowhere"), "cannot read nowhere/drift.json")
    refused(parity("score", "--golden", "golden", "--text", "prompts.txt"), "both --text and --golden")
    refused(parity("score", "--golden", "golden", "--alone"), "more than one base")
    refused(parity("score"), "no text was given", "--golden")


def test_a_chunk_is_sent_as_its_text(reference: Reference, stories: Path) -> None:
    """Characters of several tokens are whole in a chunk's text; of one that the chunk cuts nothing is left."""
    tokens = reference.tokenize(stories, "a naïve 🎈🎈 你好").ids
    assert text_of(tokens, stories, reference) == "a naïve 🎈🎈 你好"
    assert reference.text(stories, tokens[1:-1]) == "a naïve 🎈🎈 你"
