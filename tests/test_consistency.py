"""`parity consistency`: an engine against itself, and what is suspected if it disagrees."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli
from foreign import numpy_engine
from msgspec.structs import replace
from slow import slow_but
from split_files import split

from checkpoints.answers.consistency import Consistency
from checkpoints.points import parse
from engine import ops
from engine.backend import choose
from engine.graph import Step
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.consistency.consistency import ConsistencyRequest, of_side
from parity.run.ours import OursJob, dump
from parity.run.request import Prompt, Request
from parity.run.sides import OurEngine

IDS = (1, 403, 407, 261, 378, 390)
Change = Callable[[Step], Step]


def counted_from_the_pass(x: Any, positions: Any, factors: Any = None, **params: Any) -> Any:
    return ops.rope(x, positions - positions[0], factors, **params)


def first_row_again(history: Any) -> Any:
    wrong = history.copy()
    wrong[-1] = wrong[0]  # the last row is written over the first one's place
    return wrong


def stale(history: Any) -> Any:
    return history if len(history) % 2 else first_row_again(history)


def masked_by_the_pass(scores: Any, positions: Any, keys: Any, *, scale: float) -> Any:
    return ops.causal_soft_max(scores, positions - positions[0], keys, scale=scale)


def unmasked(scores: Any, positions: Any, keys: Any, *, scale: float) -> Any:
    return ops.causal_soft_max(scores, np.zeros_like(positions) + keys.max(), keys, scale=scale)


def few_rows(x: Any, weight: Any, bias: Any = None) -> Any:
    result = ops.linear(x, weight, bias)
    return result * np.float32(1.001) if len(x) == 1 else result


# fault: the kinds of step it changes, the operation instead, the suspect
FAULTS = {
    "positions": (("q_rope", "k_rope"), counted_from_the_pass, "positions"),
    "cache": (("k_read",), stale, "cache"),
    "mask": (("kq_soft_max",), masked_by_the_pass, "mask"),
    "batch": (("ffn_gate",), few_rows, "batch size"),
}


def engine_with(model: Path, kinds: Sequence[str] = (), op: Any = None) -> Transformer:
    engine = Transformer(GgufModel(model), choose("numpy"))
    engine.steps = [replace(step, op=op) if parse(step.makes).kind in kinds else step for step in engine.steps]
    return engine


def checked(engine: Transformer, **request: Any) -> Consistency:
    run = Request(model=engine.model.path, **({"points": "all"} | request))
    return of_side(OurEngine(run, engine=engine), Prompt(None, IDS, ()), ConsistencyRequest(run), engine.hp.n_vocab)


@pytest.mark.parametrize("like", ["tiny", "tiny-llama"])
def test_our_engine_agrees_with_itself(like: str, synthetic: Callable[..., Path]) -> None:
    """In portions, among other sequences and from a restored state every point is the same to 1e-10; the mask is causal."""
    answer = checked(engine_with(synthetic(like, layers=3)))
    assert answer
    assert [check.name for check in answer.checks] == [
        "prefill and one step",
        "one token at a time",
        "chunks",
        "among other sequences",
        "a restored state",
        "another last token",
    ]
    assert all(check.verdict is not None and check.verdict.compared > 100 for check in answer.checks)


@pytest.mark.parametrize("fault", slow_but(FAULTS, "positions", "cache", "mask"))
def test_what_fails_says_what_is_suspect(fault: str, synthetic: Callable[..., Path]) -> None:
    """A fault that only portions show is found, and the answer distinguishes positions, cache, mask and batch size."""
    kinds, op, suspect = FAULTS[fault]
    answer = checked(engine_with(synthetic(layers=3), kinds, op))
    assert not answer
    steps = {check.name: check for check in answer.checks}
    assert steps["one token at a time"].suspect == suspect
    assert steps["another last token"].suspect == ""


@pytest.mark.slow
def test_a_missing_mask_is_seen_by_an_exchanged_token(synthetic: Callable[..., Path]) -> None:
    """Without a causal mask another last token changes earlier positions."""
    answer = checked(engine_with(synthetic(layers=3), ("kq_soft_max",), unmasked))
    check = next(check for check in answer.checks if check.name == "another last token")
    assert check.suspect == "mask"


def test_few_points_still_say_where_to_look(synthetic: Callable[..., Path]) -> None:
    """With layer outputs only, the answer says that the error comes after the first portion, and what to record to know more."""
    answer = checked(engine_with(synthetic(layers=3), ("q_rope", "k_rope"), counted_from_the_pass), points="blk.*.l_out")
    check = next(check for check in answer.checks if check.name == "chunks")
    assert check.suspect == "cache, positions or mask"
    assert "--points all" in check.reason


def dumped(model: Path, out: Path, led: int, op: Any = None) -> Path:
    engine = engine_with(model, ("q_rope", "k_rope") if op else (), op)
    ids = IDS[: len(IDS) - led]
    dump(engine, OursJob(out, ids, points="all", generated=IDS[len(IDS) - led :], generated_pieces=("",) * led))
    return out


def test_two_dumps_of_a_foreign_engine(parity: Cli, synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """A prefill and a prefill with decode steps over the same tokens agree, or the suspect is named."""
    model = synthetic(layers=3)
    whole, steps = dumped(model, tmp_path / "a.jsonl", 0), dumped(model, tmp_path / "b.jsonl", 3)
    code, answer = parity.json("consistency", whole, steps)
    assert (code, answer["verdict"]) == (0, "consistent")
    code, answer = parity.json("consistency", whole, dumped(model, tmp_path / "c.jsonl", 3, counted_from_the_pass))
    assert (code, answer["checks"][0]["suspect"]) == (1, "positions")
    ran = parity("consistency", whole, whole)
    assert ran.code == 2
    assert "same portions" in ran.err


@pytest.mark.slow
def test_the_command_and_what_it_refuses(parity: Cli, stories: Path) -> None:
    """It runs on the embedded model; one token, one dump, no prompt are one line each."""
    ran = parity("consistency", "--tokens", "1,403,407", "--points", "default", "--model", stories)
    assert ran.code == 0
    assert "consistent: 5 checks" in ran.out
    for arguments in (["--tokens", "5"], ["a.jsonl"], [], ["a.jsonl", "b.jsonl"], ["--tokens", "1,2", "--points", "nothing"]):
        ran = parity("consistency", *arguments)
        assert (ran.code, ran.err.count("\n")) == (2, 1)


@pytest.mark.parametrize(("options", "limit", "said"), [((), 3e-4, True), (("--compute", "f32"), 1e-10, False)])
def test_what_an_engine_computes_in_is_said_of_both_dumps(
    parity: Cli, tmp_path: Path, options: tuple[str, ...], limit: float, said: bool
) -> None:
    """Decode off by 1e-8 is no float32: --compute f32 finds it, and without it the answer says that its limit is assumed."""
    for name, factor, step in (("a.jsonl", 1.0, 0), ("b.jsonl", 1.0001, 1)):
        rows = [(point, at) for point in ("embd", "logits") for at in (0, 1)]
        lines = [
            {
                "checkpoint": point,
                "token_idx": at,
                "step": at * step,
                "values": [1.23456789 * factor, -2.34567891 * factor, 3.45678912 + at],
            }
            for point, at in rows
        ]
        header = [{"type": "header", "format": 1, "source": "somebody's"}] * step
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in (*header, *lines)))
    ran = parity("consistency", tmp_path / "a.jsonl", tmp_path / "b.jsonl", *options)
    assert ran.code == (0 if said else 1)
    assert ran.out.startswith("engine  somebody's\n")
    assert ("limit assumed" in ran.out) is said
    assert ran.out.rstrip().endswith(f"limit {limit:.0e}")


@pytest.mark.slow
def test_a_restored_state_lacks_nothing(parity: Cli, synthetic: Callable[..., Path]) -> None:
    """A right engine is consistent without reserve: it must not compute again what the state holds."""
    line = numpy_engine(*EVERY_WAY)
    words = ("consistency", "--tokens", "1,17,40,29", "--model", synthetic(layers=2), "--compute", "f32", "--exec", line)
    ran = parity(*words)
    assert ran.out.splitlines()[-1] == "consistent: 6 checks, limit 1e-10"


@pytest.mark.slow
def test_an_engine_that_takes_no_portions_is_not_vouched_for(parity: Cli, synthetic: Callable[..., Path]) -> None:
    """An engine whose dumps show one pass whatever it is told: the answer says so and how passes are recorded."""
    line = f"X={{portions}} {numpy_engine()}"
    code, answer = parity.json("consistency", "--tokens", "1,17,40,29", "--model", synthetic(layers=2), "--exec", line)
    assert code == 0
    (doubt,) = [sentence for sentence in answer["not_checked"] if "its dumps show other passes" in sentence]
    assert "parity_pass in C" in doubt


EVERY_WAY = ("--portions={portions}", "--state={state}", "--ubatch={ubatch}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "failing", "suspect", "point"),
    [
        ("", set(), "", ""),
        ("ubatch", {"ubatches of 1", "prefill and one step"}, "positions", "blk.0.q_rope"),
        ("pad", {"among other sequences"}, "sequences", "blk.0.kqv_out"),
        ("leak", {"among other sequences"}, "sequences", "blk.0.kqv_out"),
        ("state", {"a restored state"}, "state", "blk.0.kqv_out"),
    ],
)
def test_every_way_of_a_foreign_engine(
    parity: Cli, synthetic: Callable[..., Path], fault: str, failing: set[str], suspect: str, point: str
) -> None:
    """Ubatches, a batch of unequal sequences and a restored state: each fault fails in its own way, at its operation."""
    line = numpy_engine(*EVERY_WAY, f"--fault={fault}")
    code, answer = parity.json("consistency", "--tokens", "1,17,40,29", "--model", synthetic(layers=2), "--exec", line)
    checks = {check["name"]: check for check in answer["checks"]}
    wrong = {name for name, check in checks.items() if check["diff"]["verdict"] != "parity"}
    assert code == bool(failing)
    assert failing <= wrong
    assert bool(wrong) == bool(failing)
    assert answer["not_checked"] == []
    for name in failing:
        assert (checks[name]["suspect"], checks[name]["diff"]["first_divergence"]["checkpoint"]) == (suspect, point)


@pytest.mark.slow
def test_llama_cpp_against_itself(parity: Cli, synthetic: Callable[..., Path]) -> None:
    """llama.cpp in portions, ubatches, among other sequences and from a saved state: the same to rounding, a state to the bit."""
    code, answer = parity.json("consistency", "--tokens", "1,17,40,29,5", "--model", synthetic(layers=2), "--side", "ref")
    assert code == 0
    checks = {check["name"]: check for check in answer["checks"]}
    assert {"ubatches of 1", "ubatches of 4", "among other sequences", "a restored state"} <= set(checks)
    assert checks["a restored state"]["first_to_differ"] == ""


@pytest.mark.slow
def test_llama_cpp_is_consistent_on_a_split_model(parity: Cli, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """The first of several files is taken for the model."""
    first = split(small_model("qwen3", "f32", layers=2), tmp_path / "split.gguf")
    assert "consistent" in parity("consistency", "--side", "ref", "--model", first, "--tokens", "5,6,7").out


def test_a_model_without_a_tokenizer(parity: Cli, tmp_path: Path) -> None:
    """Token ids are enough: nothing of the checks needs a text."""
    model = tmp_path / "model.gguf"
    assert parity("synth", "--architecture", "qwen3", "--layers", "1", "--stub-vocabulary", "-o", model).code == 0
    assert "consistent" in parity("consistency", "--model", model, "--tokens", "5,6,7").out
