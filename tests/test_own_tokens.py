"""`parity run --exec` and `explain` of an engine that computes other tokens than the prompt's, or more of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import Cli

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")

PROMPT = "2047,430,457,258,403"
DOUBLED, MISSING, OTHER, LONGER = "2047,2047,430,457,258,403", "430,457,258,403", "2047,430,457,259,403", f"{PROMPT},17,99"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ids", "words"), [(DOUBLED, "the first one is doubled"), (MISSING, "the first one is missing")], ids=["doubled", "missing"]
)
def test_a_wrong_beginning_is_the_cause(
    c_engine: Path, parity: Cli, synthetic: Callable[..., Path], ids: str, words: str
) -> None:
    """BOS doubled or missing, as the engine's own header says: the hunt names it, and does not acquit what it computed from that."""
    line = f"{c_engine} {{model}} {ids} {{out}} '' {{points}}"
    code, answer = parity.json(
        "run", "--model", synthetic(layers=4), "--tokens", PROMPT, "--exec", line, "--hunt", "--out", "h"
    )
    assert (code, answer["first_divergence"]["checkpoint"], answer["explained_on_own_tokens"]) == (1, "tokens", False)
    (cause,) = answer["explanation"]["causes"]
    assert (cause["fault"], cause["explained"]) == ("bos", 1.0)
    assert words in cause["sentence"]
    assert (
        parity.json("explain", "h/ours.jsonl", "--model", synthetic(layers=4), "--tokens", PROMPT)[1]["causes"][0]["fault"]
        == "bos"
    )


@pytest.mark.slow
def test_explain_says_which_token_is_another_one(c_engine: Path, parity: Cli, synthetic: Callable[..., Path]) -> None:
    """--tokens that are not those of the dump's header: the first one that differs is a note, whatever the rest of the answer is."""
    line = f"{c_engine} {{model}} {OTHER} {{out}} '' {{points}}"
    parity("run", "--model", synthetic(layers=2), "--tokens", PROMPT, "--exec", line, "--out", "h")
    code, answer = parity.json("explain", "h/ours.jsonl", "--model", synthetic(layers=2), "--tokens", PROMPT)
    assert code == 1
    assert "token 3 is 259 in the dump, 258 in the prompt that was given" in answer["notes"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["", "rope"], ids=["right", "wrong"])
def test_what_is_computed_from_other_tokens_is_judged_by_itself(
    c_engine: Path, parity: Cli, synthetic: Callable[..., Path], fault: str
) -> None:
    """One token differs: that is the divergence, and on its own tokens the engine is right, or has a fault beside it."""
    line = f"{c_engine} {{model}} {OTHER} {{out}} '{fault}' {{points}}"
    words = ("run", "--model", synthetic(layers=2), "--tokens", PROMPT, "--exec", line, "--hunt", "--out", "h")
    if not fault:
        ran = parity(*words)
        assert ran.code == 1
        for part in ("divergence at tokens", "token 3 is 259 in ours", "On the tokens that its dump lists", "no fault"):
            assert part in " ".join(ran.out.split())
        return
    answer = parity.json(*words)[1]
    assert answer["explained_on_own_tokens"]
    assert [cause["fault"] for cause in answer["explanation"]["causes"]] == ["rope-pairs"]


@pytest.mark.slow
def test_an_engine_that_goes_on_is_compared_over_the_prompt(
    c_engine: Path, parity: Cli, synthetic: Callable[..., Path]
) -> None:
    """Positions after what was asked for are listed as missing on the other side, with and without a lead along generated tokens."""
    model = synthetic(layers=4)
    code, answer = parity.json("run", "--model", model, "--tokens", PROMPT, "--exec", f"{c_engine} {{model}} {LONGER} {{out}}")
    assert (code, answer["first_divergence"]["token_idx"], answer["missing"]["ref"]["records"]) == (1, 5, 2 * 7)
    longer = f"{c_engine} {{model}} {{tokens}},17,99 {{out}}"
    code, answer = parity.json("run", "--model", model, "--tokens", PROMPT, "--generate", "2", "--exec", longer)
    assert (answer["compared"], answer["missing"]["ref"]["records"]) == (7 * 7, 2 * 7)


@pytest.mark.slow
def test_layers_are_not_judged_on_other_tokens(c_engine: Path, parity: Cli, synthetic: Callable[..., Path]) -> None:
    """--bisect of an engine that doubles BOS: rows would be injected at other positions, so the tokens are the answer, not "all right"."""
    line = f"{c_engine} {{model}} {DOUBLED} {{out}} '' {{points}}"
    words = ("run", "--model", synthetic(layers=2), "--tokens", PROMPT, "--exec", line, "--bisect", "--out", "h")
    code, answer = parity.json(*words)
    assert (code, answer["verdict"], answer["wrong"]) == (1, "divergence", ["tokens"])
    assert "ours has the first token twice" in answer["answer"]
    assert "(no layer was judged)" in parity(*words).out
