"""A server as a side: real ones on loopback, right and with planted faults, and the shapes of their answers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli, refused
from servers import Start

from checkpoints.answers.server import ServerAnswer
from parity.run.session import resolve_prompt
from parity.score.measures import Listed, largest, log_sum
from parity.server.ask import ServerReply, _echoed
from parity.server.base import kl, listed
from parity.server.http import ServerError
from parity.server.numbers import tells
from parity.server.penalties import BANNED, Seen, biases, less, repeated, subtracted, with_bias
from parity.server.predictions import Prediction, TokenCandidate, legacy
from parity.server.predictions import listed as read_list
from parity.server.truncation import truncations
from parity.server.vocabulary import Vocabulary
from reference.client import Reference
from reports.server import sentence

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


LEGACY = {
    "tokens": ["Once", " upon"],
    "token_logprobs": [None, -0.25],
    "top_logprobs": [None, {" upon": -0.25, " there": -1.5}],
}
ENTRY = {"id": 7, "token": " a", "bytes": [32, 97], "logprob": -0.5}


def test_every_schema_is_read() -> None:
    """OpenAI's lists, the newer objects, llama.cpp's probabilities and its schema before 2025 give the same predictions."""
    first, second = legacy(LEGACY, "x")
    assert (first.token.logprob, first.candidates) == (0.0, ())
    assert [(item.text, item.logprob) for item in second.candidates] == [(" upon", -0.25), (" there", -1.5)]
    newer = read_list([ENTRY | {"top_logprobs": [ENTRY, ENTRY | {"id": 8, "token": " b", "logprob": -9999.0 * 2}]}], "x")[0]
    assert (newer.token.id, newer.token.data, newer.candidates[1].logprob) == (7, b" a", -math.inf)
    sampled = {"id": 7, "token": " a", "prob": 0.5, "top_probs": [{"id": 7, "token": " a", "prob": 0.5}]}
    assert read_list([sampled], "x")[0].candidates[0].logprob == pytest.approx(math.log(0.5))
    older = {"content": " a", "probs": [{"tok_str": " a", "prob": 0.5}, {"tok_str": " b", "prob": 0}]}
    assert read_list([older], "x")[0].token.logprob == pytest.approx(math.log(0.5))
    assert legacy({"tokens": ["token_id:42"], "token_logprobs": [-1.0]}, "x")[0].token.id == 42


@pytest.mark.parametrize(
    "broken",
    [
        {"tokens": ["a"], "token_logprobs": []},
        {"tokens": ["a"], "token_logprobs": [math.nan]},
        {"tokens": ["a"], "token_logprobs": ["x"]},
        {"tokens": ["a"], "token_logprobs": [True]},
        {"tokens": ["a"], "token_logprobs": [5e9]},
        {"tokens": [1], "token_logprobs": [-1]},
        {"tokens": "a", "token_logprobs": [-1]},
        {"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": [["b"]]},
        {"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": [{"b": None}]},
        [7],
        [{"token": "a"}],
        [{"token": "a", "logprob": math.nan}],
        [{"token": "a", "prob": 2}],
        [{"logprob": -1}],
        [{"token": "a", "logprob": -1, "top_logprobs": [3]}],
        [{"token": "a", "logprob": -1, "bytes": [300]}],
    ],
)
def test_what_is_no_prediction_is_one_line(broken: Any) -> None:
    """Lists of other lengths, NaN, words, numbers that are no logits either: refused with the reason."""
    with pytest.raises(ServerError, match="cannot be read"):
        legacy(broken, "x") if isinstance(broken, dict) else read_list(broken, "x")


@pytest.mark.parametrize(("read", "cut"), [("Once upon a", 11), ("Once upon a time", None), ("Twice", None)])
def test_a_text_of_which_the_beginning_was_read_is_seen(
    stories: Path, reference: Reference, read: str, cut: int | None
) -> None:
    """An echo that is the beginning of the text says how many characters were read; the whole text or another one is none."""
    prompt = resolve_prompt(reference, stories, "Once upon a time", None)
    ids = reference.tokenize(stories, read).ids[1:]
    vocabulary = Vocabulary(reference.pieces(stories, range(reference.tokenize(stories, read).n_vocab)))
    shown = [Prediction(TokenCandidate(piece, -0.5), ()) for piece in reference.pieces(stories, ids)]
    reply = _echoed(ServerReply(prompt.ids, len(prompt.ids), (), True), shown, prompt, vocabulary)
    assert reply.cut == cut
    assert (reply.tokenizer is None) is (read == prompt.text)


def test_kl_is_a_lower_bound_of_the_whole() -> None:
    """Over a server's five candidates and one entry for the rest, KL is at most that of whole rows, and 0 for the same row."""
    random = np.random.default_rng(0)
    row, other = (random.normal(0, 2, 300).astype(np.float32) for _ in range(2))
    vocabulary = Vocabulary([f"t{number}" for number in range(300)])
    log = other - np.log(np.exp(other.astype(np.float64)).sum())
    top = np.argsort(-other)[:5]
    server = listed([TokenCandidate(f"t{n}", float(log[n])) for n in top], vocabulary, row)
    p = row - np.log(np.exp(row.astype(np.float64)).sum())
    assert 0 < kl(row, server) <= float(np.sum(np.exp(p) * (p - log)))
    assert kl(other, server) == pytest.approx(0, abs=1e-9)


def test_what_sums_to_more_than_1_is_never_right() -> None:
    """A confident row to the base 10: its entries are all nearly 0, but they sum to more than 1."""
    row = np.array([12.0, 6.0, 1.0, *[-20.0] * 29], dtype=np.float32)
    vocabulary = Vocabulary([f"t{number}" for number in range(32)])
    log = row - np.log(np.exp(row.astype(np.float64)).sum())
    server = listed([TokenCandidate(f"t{n}", float(log[n] / np.log(10))) for n in range(3)], vocabulary, row)
    assert kl(row, server) > 0.05
    assert kl(row, listed([TokenCandidate(f"t{n}", float(log[n])) for n in range(3)], vocabulary, row)) == pytest.approx(
        0, abs=1e-9
    )


@pytest.mark.parametrize(("what", "kept"), [("a top-k of 7", 7), ("a top-p of 0.9", None), ("a min-p of 0.1", None)])
def test_a_truncation_is_found_by_its_offsets(what: str, kept: int | None) -> None:
    """Rows cut by top-k, top-p or min-p: of the three that fit best, one is it, and it leaves the same tokens."""
    random = np.random.default_rng(3)
    rows = [random.normal(0, 2, 300).astype(np.float32) for _ in range(8)]
    offsets, cuts = [], []
    for row in rows:
        p = np.sort(np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum())[::-1]
        count = kept or (int(np.searchsorted(np.cumsum(p), 0.9)) + 1 if "top-p" in what else int((p >= 0.1 * p[0]).sum()))
        offsets.append(float(-np.log(p[:count].sum())))
        cuts.append(count)
    fit = next(truncation for truncation in truncations(rows, offsets) if truncation.what == what)
    assert [int((fit.left(row) > -60).sum()) for row in rows] == cuts


def _kept_by(sampler: Any, row: np.ndarray) -> list[int]:
    """The tokens that one of llama.cpp's samplers leaves of a row of logits."""
    import llama_cpp

    data = (llama_cpp.llama_token_data * len(row))(*((token, float(logit), 0.0) for token, logit in enumerate(row)))
    array = llama_cpp.llama_token_data_array(data, len(row), -1, False)
    llama_cpp.llama_sampler_apply(sampler, array)
    llama_cpp.llama_sampler_free(sampler)
    left = [array.data[place] for place in range(array.size)]
    return sorted(item.id for item in left if np.isfinite(item.logit))


@pytest.mark.parametrize(
    ("what", "sampler"),
    [
        ("a top-n-sigma of 1.5", lambda llama: llama.llama_sampler_init_top_n_sigma(1.5)),
        ("a typical-p of 0.5", lambda llama: llama.llama_sampler_init_typical(0.5, 1)),
        ("an XTC threshold of 0.05", lambda llama: llama.llama_sampler_init_xtc(1.0, 0.05, 1, 7)),
    ],
)
def test_a_sampler_that_keeps_other_tokens_than_the_likeliest_is_llama_cpps(what: str, sampler: Callable[[Any], Any]) -> None:
    """What llama.cpp's own sampler leaves of a row is what the truncation that fits its probabilities leaves."""
    import llama_cpp

    random = np.random.default_rng(3)
    rows = [random.normal(0, 2, 300).astype(np.float32) for _ in range(8)]
    kept = [_kept_by(sampler(llama_cpp), row) for row in rows]
    offsets = [log_sum(row) - log_sum(row[tokens]) for row, tokens in zip(rows, kept, strict=True)]
    fit = next(truncation for truncation in truncations(rows, offsets) if truncation.what == what)
    assert [np.flatnonzero(fit.left(row) > -60).tolist() for row in rows] == kept


def test_a_penalty_is_llama_cpps() -> None:
    """Positive logits of seen tokens are divided, negative ones multiplied, others left (llama_sampler_penalties)."""
    row = np.array([2.0, -2.0, 1.0], dtype=np.float32)
    np.testing.assert_array_equal(repeated(row, (0, 1, 1), 2.0), np.array([1.0, -4.0, 1.0], dtype=np.float32))


def test_penalties_and_biases_are_fitted_from_a_few_candidates() -> None:
    """Presence and frequency penalties, a bias of two tokens and a ban: from the ten candidates that a server lists of 300 tokens."""
    random = np.random.default_rng(5)
    rows = [random.normal(0, 3, 300).astype(np.float32) for _ in range(24)]
    before = [random.choice(np.argsort(-row)[:10], 6).tolist() for row in rows]

    def seen(change: Callable[[np.ndarray, list[int]], np.ndarray]) -> list[Seen]:
        sample = []
        for row, tokens in zip(rows, before, strict=True):
            changed = change(row, tokens)
            ids = largest(changed, 10)
            noise = random.normal(0, 0.01, 10)
            sample.append(Seen(Listed(ids, changed[ids].astype(np.float64) - log_sum(changed) + noise), row, tokens))
        return sample

    both = subtracted(seen(lambda row, tokens: less(row, tokens, 0.6, 0.4)))
    assert both == pytest.approx((0.6, 0.4), abs=0.05)
    assert subtracted(seen(lambda row, _: row)) is None
    often = int(np.argmax(np.sum(rows, axis=0)))
    top = int(max(rows, key=lambda row: np.ptp(row[largest(row, 10)])).argmax())
    bias = {often: 6.0, top: BANNED}
    assert biases(seen(lambda row, _: with_bias(row, bias))) == {often: pytest.approx(6.0, abs=0.2), top: BANNED}
    assert biases(seen(lambda row, _: row)) == {}


def test_improbable_candidates_explain_nothing() -> None:
    """Numbers of tokens that llama.cpp thinks impossible can be read in any way: then no reading is tried."""
    assert tells([np.array([-0.5, -1.5]), np.array([-0.2, -9.0])])
    assert not tells([np.array([-18.0, -19.0]), np.array([-12.0, -15.0]), np.array([-0.1])])
    assert not tells([])


def test_tokens_are_told_by_id_bytes_or_text() -> None:
    """A server that strips the blank is understood; half a character, which many tokens share, is not guessed."""
    vocabulary = Vocabulary([" a", "b", "b", "\ufffd", "\ufffd"])
    assert vocabulary.ids(TokenCandidate("a", 0.0)) == [0]
    assert vocabulary.ids(TokenCandidate("?", 0.0, data=b" a")) == [0]
    assert vocabulary.ids(TokenCandidate("x", 0.0, id=1)) == (1,)
    assert vocabulary.ids(TokenCandidate("x", 0.0, id=9)) == ()
    assert vocabulary.most_probable(TokenCandidate("b", 0.0), {1: 0.1, 2: 0.9}.__getitem__) == 2
    assert vocabulary.ids(TokenCandidate("\ufffd", 0.0)) == ()


@pytest.mark.parametrize(
    ("count", "sentence_part"), [(1, "1 choice is not the most probable token"), (2, "2 choices are not the most")]
)
def test_choices_of_the_sampler_are_counted(count: int, sentence_part: str) -> None:
    """Predictions that agree and choices that are not the most probable ones: the sentence counts the latter."""
    chosen = tuple((position, "a", "b") for position in range(count))
    assert sentence_part in sentence(ServerAnswer("", "", "", "", 1, (1,), (), 1.0, 0.0, True, 1, 0.0, unfaithful=chosen))
