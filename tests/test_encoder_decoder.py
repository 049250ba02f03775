"""Encoder–decoders in the commands that judge passes one by one: both halves are operations like others."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli, refused
from msgspec.structs import replace

from checkpoints.answers.consistency import Consistency
from checkpoints.answers.isolate import PROVEN
from checkpoints.dataflow import Dataflow
from checkpoints.formats import load
from engine.graph import Step
from engine.opened import open_plain
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.consistency.consistency import ConsistencyRequest, of_side
from parity.diff.compare import compare
from parity.isolate.isolate import IsolateRequest, isolate
from parity.run.ours import OursJob, dump
from parity.run.request import Prompt, Request
from parity.run.sides import LlamaCpp, OurEngine
from reference.client import Reference
from reference.jobs import DumpJob

IDS = (3, 44, 5, 60, 7, 18, 9)
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def t5(small_model: Make) -> Path:
    return small_model("t5", "q8_0", layers=2)


@pytest.fixture(scope="module")
def engine(t5: Path, reference: Reference) -> Transformer:
    return open_plain(GgufModel(t5), "numpy", recorded=partial(reference.graph, t5))


def spoiled(steps: Sequence[Step], name: str, factor: float = 1.001) -> list[Step]:
    """The steps, the result of one of them too large."""

    def larger(op: Callable[..., Any], *inputs: Any, **params: Any) -> Any:
        return op(*inputs, **params) * np.float32(factor)

    assert any(step.makes == name for step in steps)
    return [replace(step, op=partial(larger, step.op)) if step.makes == name else step for step in steps]


@pytest.mark.parametrize("mode", ["native", "exact"])
def test_every_operation_of_both_halves_is_proven(t5: Path, reference: Reference, mode: str) -> None:
    """The encoder's pass over the prompt, the decoder's over its own tokens and the encoder's rows: llama.cpp's are ours."""
    isolation = isolate(IsolateRequest(t5, tokens=IDS, mode=mode, generate=2), reference)
    assert isolation
    assert {item.status for item in isolation.operations} == {PROVEN}
    assert {"enc.embd", "enc.blk.1.kq_soft_max", "enc.output_norm", "blk.1.cross_kq", "blk.0.kq_b", "logits"} <= {
        item.name for item in isolation.operations
    }


ENCODERS, DECODERS = ("enc.blk.1.ffn_out", "enc.blk.0.kq"), ("blk.1.cross_kqv.ggml", "blk.0.k")
SHOWN = {"blk.1.cross_kqv.ggml": "blk.1.cross_kqv"}  # a value in ggml's order, and the point that shows it


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_a_wrong_operation_of_either_half_is_named_alone(t5: Path, engine: Transformer, tmp_path: Path, name: str) -> None:
    """A thousandth too much in one operation of the encoder, or of the decoder, is that operation, in a dump of an engine's own."""
    decoder, encoder = engine.steps, engine.encoder
    try:
        if name in ENCODERS:
            engine.encoder = spoiled(encoder or (), name)
        else:
            engine.steps = spoiled(decoder, name)
        job = OursJob(tmp_path / "foreign.jsonl", IDS, generated=(5, 9), points="all", full=True)
        dump(engine, job)
    finally:
        engine.steps, engine.encoder = decoder, encoder
    isolation = isolate(IsolateRequest(t5, dump=job.out))
    assert [item.name for item in isolation.wrong] == [SHOWN.get(name, name)]


def test_an_encoder_that_was_not_recorded(t5: Path, engine: Transformer, tmp_path: Path) -> None:
    """Without the encoder's output cross-attention is not observable, and the reason says so; the decoder's other operations are judged."""
    job = OursJob(tmp_path / "foreign.jsonl", IDS, generated=(5,), points="blk.*,embd,output_norm,logits", full=True)
    dump(engine, job)
    isolation = isolate(IsolateRequest(t5, dump=job.out, windows=False))
    states = {item.name: item for item in isolation.operations}
    assert states["blk.0.q"].status == PROVEN
    assert "encoder's output" in states["blk.0.cross_kq"].reason
    assert not isolation.wrong


@pytest.mark.slow
def test_generated_tokens_that_a_dump_does_not_say(parity: Cli, t5: Path, engine: Transformer, tmp_path: Path) -> None:
    """isolate and explain ask for the decoder's tokens as lines of the dump: --tokens are the encoder's. With them they go on."""
    job = OursJob(tmp_path / "whole.jsonl", IDS, generated=(5, 9), points="all", full=True)
    dump(engine, job)
    lines = job.out.read_text().splitlines()
    without = tmp_path / "without.jsonl"
    without.write_text("\n".join(line for line in lines if json.loads(line).get("type") != "token") + "\n")
    for command in ("isolate", "explain"):
        refused(
            parity(command, without, "--model", t5), "has records of position", '"type": "token"', "--tokens are the encoder's"
        )
    # The advice's own line, for the tokens that were generated after the start token at position 0.
    token_lines = [json.dumps({"type": "token", "token_idx": index, "id": token}) for index, token in ((1, 5), (2, 9))]
    without.write_text(without.read_text() + "\n".join(token_lines) + "\n")
    assert parity("isolate", without, "--model", t5).code == 0


def checked(side: OurEngine | LlamaCpp, run: Request, vocabulary: int) -> Consistency:
    return of_side(side, Prompt(None, IDS, (), decoded=IDS[:-1]), ConsistencyRequest(run), vocabulary)


@pytest.mark.slow
def test_other_portions_of_the_decoder_come_out_the_same(t5: Path, engine: Transformer, reference: Reference) -> None:
    """The decoder's tokens in every way agree, in our engine and in llama.cpp (portions only); a later one changes nothing earlier."""
    run = Request(t5, points="all")
    for side, count in ((OurEngine(run, engine=engine), 6), (LlamaCpp(run, reference), 4)):
        answer = checked(side, run, engine.hp.n_vocab)
        assert answer
        assert len(answer.checks) == count
        assert all(check.verdict is not None and check.verdict.compared > 500 for check in answer.checks)


@pytest.mark.slow
def test_portions_of_a_decoder_that_disagree(t5: Path, engine: Transformer) -> None:
    """A key that a step over one token makes otherwise than a pass over several is seen."""

    def few_rows(op: Callable[..., Any], x: Any, *weights: Any, **params: Any) -> Any:
        result = op(x, *weights, **params)
        return result * np.float32(1.01) if len(x) == 1 else result

    run, right = Request(t5, points="all"), engine.steps
    try:
        engine.steps = [
            replace(step, op=partial(few_rows, step.op)) if step.makes == "blk.1.cross_Qcur" else step for step in right
        ]
        answer = checked(OurEngine(run, engine=engine), run, engine.hp.n_vocab)
    finally:
        engine.steps = right
    assert not answer
    assert [check.name for check in answer.checks if not check.verdict] == ["prefill and one step", "one token at a time"]


def test_an_engine_is_not_told_the_decoders_tokens(parity: Cli, t5: Path) -> None:
    """A command line has one prompt, the encoder's: how to check the decoder all the same is said."""
    refused(parity("consistency", "--model", t5, "--tokens", "3,4,5", "--exec", "engine {model} {tokens} {out}"), "decoder")


def test_what_an_encoder_spoils_is_inherited(t5: Path, engine: Transformer, reference: Reference, tmp_path: Path) -> None:
    """The header's dataflow joins both halves: an encoder's wrong operation is the one origin, named by its inputs, in whole dumps."""
    job = DumpJob(t5, tmp_path / "ref.jsonl", IDS, points="all", lead=(5, 9))
    reference.dump(job)
    encoder = engine.encoder
    try:
        engine.encoder = spoiled(encoder or (), "enc.blk.1.ffn_up", 1.1)
        dump(engine, OursJob(tmp_path / "ours.jsonl", IDS, generated=(5, 9), points="all"))
    finally:
        engine.encoder = encoder
    verdict = compare(load(tmp_path / "ours.jsonl"), load(job.out))
    assert [origin.first.checkpoint for origin in verdict.origins] == ["enc.blk.1.ffn_up"]
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "enc.blk.1.ffn_up"


def test_default_points_are_of_both_halves(parity: Cli, t5: Path, tmp_path: Path) -> None:
    """Without --points an encoder–decoder shows both halves' embedding, layers and norm."""
    code, answer = parity.json("run", "--model", t5, "--tokens", "3,4,5", "--out", tmp_path / "out")
    assert code == 0
    halves = ("embd", "blk.0.l_out", "blk.1.l_out", "output_norm")
    assert [point["checkpoint"] for point in answer["points"]] == [*(f"enc.{name}" for name in halves), *halves, "logits"]


@pytest.mark.slow
def test_the_encoder_of_a_foreign_engine_is_compared(parity: Cli, t5: Path, tmp_path: Path) -> None:
    """llama.cpp records what an engine printed of either half: a right engine agrees at all of it, and nothing is called missing."""
    ids = ",".join(map(str, IDS))
    assert parity("dump", "ours", "--model", t5, "--tokens", ids, "-o", tmp_path / "ours.jsonl").code == 0
    code, answer = parity.json(
        "run", "--model", t5, "--tokens", ids, "--exec", f"cp {tmp_path}/ours.jsonl {{out}}", "-o", tmp_path / "run"
    )
    assert (code, answer["verdict"]) == (0, "parity")
    assert load(tmp_path / "run" / "ref.jsonl").points.keys() == load(tmp_path / "ours.jsonl").points.keys()


def test_a_description_has_the_dataflow_of_a_dump_and_a_score_is_refused(
    parity: Cli, t5: Path, reference: Reference, tmp_path: Path
) -> None:
    """What the points of both halves are made from is known without a dump; over a text there is nothing to predict."""
    reference.dump(DumpJob(t5, tmp_path / "ref.jsonl", IDS, points="all"))
    header = load(tmp_path / "ref.jsonl").header
    assert header is not None
    assert reference.describe(t5).dataflow == Dataflow.from_json(header.dataflow)
    (tmp_path / "text.txt").write_text("Once upon a time")
    for side in ("ours", "ref"):
        refused(
            parity("score", "--text", "text.txt", "--model", t5, "--context", "4", "--side", side), "is an encoder, or has one"
        )
