"""The shapes in which servers give predictions, what is no prediction, and tokens told by id, bytes or text."""

import math
from pathlib import Path
from typing import Any

import pytest

from parity.run.session import resolve_prompt
from parity.server.ask import ServerReply, _echoed
from parity.server.http import ServerError
from parity.server.predictions import Prediction, TokenCandidate, legacy
from parity.server.predictions import listed as read_list
from parity.server.vocabulary import Vocabulary
from reference.client import Reference

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


def test_tokens_are_told_by_id_bytes_or_text() -> None:
    """A server that strips the blank is understood; half a character, which many tokens share, is not guessed."""
    vocabulary = Vocabulary([" a", "b", "b", "\ufffd", "\ufffd"])
    assert vocabulary.ids(TokenCandidate("a", 0.0)) == [0]
    assert vocabulary.ids(TokenCandidate("?", 0.0, data=b" a")) == [0]
    assert vocabulary.ids(TokenCandidate("x", 0.0, id=1)) == (1,)
    assert vocabulary.ids(TokenCandidate("x", 0.0, id=9)) == ()
    assert vocabulary.most_probable(TokenCandidate("b", 0.0), {1: 0.1, 2: 0.9}.__getitem__) == 2
    assert vocabulary.ids(TokenCandidate("\ufffd", 0.0)) == ()
