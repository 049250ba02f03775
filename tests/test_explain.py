"""`parity explain`: causes in one layer, several at once, no false accusation, honest answers if nothing is known."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, refused
from explaining import PROMPT, RIGHT, STEPS, only
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of
from slow import slow_but

from checkpoints.formats import shifted
from checkpoints.jsonl import Writer
from checkpoints.reading.reader import read
from checkpoints.record import Dump, Header
from engine import ops
from engine.backend import Array
from engine.faults import CATALOGUE, plant
from parity.explain.budget import Budget
from parity.explain.explain import Case, ExplainOptions, explain
from parity.explain.findings.apart import apart
from parity.explain.search.state import Candidate
from parity.explain.search.together import Together

_PATIENT = ExplainOptions(
    budget=600.0
)  # seconds of the clock: a search that is to end by itself, also on a machine that is shared


def test_a_right_engine_has_no_fault(engine: Faulty) -> None:
    """If nothing differs, nothing is searched and no fault is named."""
    explanation = explain(only(engine), engine.model)
    assert explanation
    assert (explanation.first, explanation.causes, explanation.variants) == (None, (), 0)


@pytest.mark.slow
def test_positions_that_an_engine_counts_from_1_are_no_fault_of_its_rope(engine: Faulty) -> None:
    """A right engine's records, rotated queries and keys among them, are taken where the model gives them; a wrong engine's as well."""
    right = shifted(only(engine, points="all"), 1)
    explanation = explain(right, engine.model, ExplainOptions(tokens=PROMPT))
    assert (explanation.first, explanation.causes) == (None, ())
    assert sum("moved by -1" in note for note in explanation.notes) == 1
    wrong = shifted(only(engine, ("activation", {"activation": "ReLU"}, (2,)), points="all"), 1)
    explanation = explain(wrong, engine.model, ExplainOptions(tokens=PROMPT))
    assert [(cause.named.fault, cause.named.layers) for cause in explanation.causes] == [("activation", (2,))]


def test_a_run_that_begins_far_from_0_keeps_its_positions(engine: Faulty, parity: Cli) -> None:
    """A right engine's dump of a long context is right where it counts: its positions are not moved."""
    tokens = ",".join(map(str, PROMPT))
    words = ("dump", "ours", "--model", engine.model, "--tokens", tokens, "--first-position", "40", "--points", "all")
    assert parity(*words, "-o", "far.jsonl").code == 0
    explanation = explain(read(Path("far.jsonl")), engine.model, ExplainOptions(tokens=PROMPT))
    assert (explanation.first, explanation.causes) == (None, ())
    assert not any("moved by" in note for note in explanation.notes)


def test_generated_tokens_alone_contradict_no_prompt(engine: Faulty) -> None:
    """A dump that lists only what it generated says nothing of the prompt: no token of it is called another one, no record left out."""
    dump = engine.dump(RIGHT, PROMPT, generated=2)
    assert dump.header is not None
    assert len(dump.tokens) == 2
    explanation = explain(replace(dump, header=replace(dump.header, tokens=())), engine.model, ExplainOptions(tokens=PROMPT))
    assert explanation
    assert not any("in the dump" in note or "left out" in note for note in explanation.notes)


def test_a_fault_in_one_unknown_layer_is_named_with_its_layer(engine: Faulty) -> None:
    """Between two checkpoints each layer is tried by itself."""
    points = "embd,blk.0.l_out,blk.3.l_out,output_norm,logits"
    explanation = explain(only(engine, ("activation", {"activation": "ReLU"}, (2,)), points=points), engine.model)
    assert explanation.last_agreement == "blk.0.l_out"
    assert [(cause.named.fault, cause.named.layers) for cause in explanation.causes] == [("activation", (2,))]
    assert explanation.remaining is None


@pytest.mark.parametrize(
    ("layers", "points"),
    [
        pytest.param((2, 3), "embd,blk.0.l_out,blk.3.l_out", marks=pytest.mark.slow),
        ((0, 1), "default"),
        pytest.param((1, 3), "default", marks=pytest.mark.slow),
    ],
)
def test_a_fault_in_some_layers_is_named_with_them(engine: Faulty, layers: tuple[int, ...], points: str) -> None:
    """From one layer on, up to one, or in every second one: one cause, not one for each layer."""
    explanation = explain(only(engine, ("activation", {"activation": "ReLU"}, layers), points=points), engine.model, _PATIENT)
    assert [(cause.named.fault, cause.named.layers) for cause in explanation.causes] == [("activation", layers)]
    assert explanation.remaining is None


@pytest.mark.slow
def test_three_faults_in_front_of_one_checkpoint_are_tried_together(engine: Faulty) -> None:
    """None of them gets past it alone: those whose effects add up to the error are tried first, and reproduce it."""
    faults = (
        ("norm-weight-missing", {"at": ("ffn_norm",)}, None),
        ("activation", {"activation": "ReLU"}, None),
        ("residual-twice", {"added": "branch", "at": ("l_out",)}, None),
    )
    case = Case(only(engine, *faults), engine.model, _PATIENT)
    screening = case.screening(case.entries, Budget(_PATIENT.budget))
    combination = next(Together(screening, screening.start(), (0,)).combinations(3))
    assert {name for name, _, _ in faults} in [{candidate.fault.name for candidate in chosen} for chosen in combination]


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_a_law_tells_of_the_place_that_the_causes_leave(engine: Faulty) -> None:
    """A known fault before an unknown one: the first is the cause, and what is left is described by its own numbers."""
    unknown = [
        replace(step, op=lambda x, y: np.roll(x + y, 1, axis=1)) if step.makes == "blk.2.l_out" else step
        for step in plant(engine.right, CATALOGUE["rope-pairs"])
    ]
    dump = engine.dump(RIGHT, PROMPT, points="embd,blk.0.l_out,blk.1.l_out,blk.2.l_out,logits", steps=unknown)
    explanation = explain(dump, engine.model, STEPS)
    assert [cause.named.fault for cause in explanation.causes] == ["rope-pairs"]
    assert explanation.remaining is not None
    assert explanation.remaining.checkpoint == "blk.2.l_out"
    assert explanation.law == "element i is the right element i − 1: the row is rolled"


@pytest.mark.parametrize(
    ("name", "other", "sentence"),
    [
        ("rope-pairs", "qk-permuted", "other points of this prompt (blk.0.q) would tell qk-permuted (hf, moved) apart"),
        ("rope-missing", "rope-position", "gives the same numbers in all that was tried"),
    ],
)
def test_what_tells_equal_faults_apart_was_tried(engine: Faulty, name: str, other: str, sentence: str) -> None:
    """Faults of one class come with the point, prompt or model that distinguishes them, or with the attempts that did not."""
    [cause] = explain(only(engine, (name, {}, None)), engine.model).causes
    assert {name, other} <= {cause.named.fault, *(named.fault for named in cause.equivalent)}
    assert sentence in cause.apart


def test_a_longer_prompt_tells_a_chunk_from_a_shift(engine: Faulty) -> None:
    """Faults that differ from some position on only are told apart by a prompt that has it."""
    from parity.explain.explain import Case

    case = Case(only(engine, ("rope-missing", {}, None)), engine.model, ExplainOptions())
    fault = CATALOGUE["rope-position"]
    few, many = (Candidate(fault, {"position": f"in chunks of {by}", "at": ("q_rope", "k_rope")}) for by in (32, 64))
    state = case.screening(case.entries, Budget(60)).start()
    assert "a prompt of 80 tokens would tell rope-position (in chunks of 64) apart" in apart(
        case, state, few, [many], Budget(60)
    )


def test_equal_patterns_of_windows_are_named(engine: Faulty) -> None:
    """A parameter of a number and a word is written as its entry says it: it ended in an internal error."""
    case = Case(only(engine, ("no-gate", {}, None)), engine.model, ExplainOptions())
    state = case.screening(case.entries, Budget(60)).start()
    first, other = (Candidate(CATALOGUE["window-pattern"], {"pattern": (every, "first")}) for every in (4, 5))
    assert "window-pattern (5 layers the first) gives the same" in apart(case, state, first, [other], Budget(60))


@pytest.mark.parametrize(
    "names",
    slow_but(
        [
            ("no-qkv-bias", "rope-pairs"),
            ("rope-base", "no-final-norm"),
            ("layer-norm", "logits-row-order"),
            ("bos", "activation"),
        ],
        ("rope-base", "no-final-norm"),
    ),
)
def test_two_faults_at_once_are_both_named(engine: Faulty, names: Sequence[str]) -> None:
    """What the first fault leaves is searched again, also where both act in front of one checkpoint."""
    explanation = explain(only(engine, *((name, {}, None) for name in names)), engine.model, _PATIENT)
    assert explanation.remaining is None
    classes = [{cause.named.fault, *(other.fault for other in cause.equivalent)} for cause in explanation.causes]
    assert all(any(name in sentences for sentences in classes) for name in names)


def test_a_missing_first_token_is_named(engine: Faulty) -> None:
    """An engine that really runs the prompt without its first token is told from one that rotates wrongly."""
    short = engine.dump(RIGHT, PROMPT[1:])
    header = short.header
    assert header is not None
    explanation = explain(replace(short, header=replace(header, tokens=PROMPT)), engine.model)
    assert explanation.causes[0].named.parameters == {"tokens": "the first one is missing"}


@pytest.mark.slow
def test_faults_of_the_cache_are_named_from_logits_of_a_generation(engine: Faulty) -> None:
    """Ten logits a position, prompt and generation, are enough; the dump comes from decode steps with a real cache."""
    tokens = tokens_of(engine.model, 14, seed=4)
    planted = Planted((("cache-not-read", {"mask": "own pass only"}, None),))
    dump = engine.dump(planted, tokens, points="logits", size=10, generated=6)
    explanation = explain(dump, engine.model)
    assert explanation.first is not None
    assert explanation.first.token_idx == 8
    assert explanation.remaining is None
    assert explanation.causes[0].named.fault == "cache-not-read"


def test_printed_decimals_are_enough(engine: Faulty, tmp_path: Path) -> None:
    """A dump of %f lines without a header, from an engine that knows nothing of parity."""
    lines = []
    for name, rows in only(engine, ("rope-pairs", {}, None)).points.items():
        for position, values in zip(rows.token_idx, rows.values, strict=True):
            numbers = ",".join(f"{value:f}" for value in values)
            lines.append(f'{{"checkpoint":"{name}","token_idx":{position},"values":[{numbers}]}}')
    path = tmp_path / "printed.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    explanation = explain(read(path), engine.model, ExplainOptions(tokens=PROMPT))
    assert [cause.named.fault for cause in explanation.causes] == ["rope-pairs"]


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_an_unknown_fault_gives_a_law_and_the_points_to_record(engine: Faulty) -> None:
    """No fault that does not fit is named: the numbers are described, and the next points to record named."""
    right = [
        replace(step, op=lambda x, y: np.roll(x + y, 1, axis=1)) if step.makes == "blk.2.l_out" else step
        for step in engine.right
    ]
    dump = engine.dump(RIGHT, PROMPT, points="embd,blk.1.l_out,blk.2.l_out,logits", steps=right)
    explanation = explain(dump, engine.model, STEPS)
    assert explanation.causes == ()
    assert explanation.remaining == explanation.first
    assert explanation.law == "element i is the right element i − 1: the row is rolled"
    assert "blk.2.q" in explanation.next


def test_a_fault_beyond_the_slice_is_named_by_the_sketch(engine: Faulty) -> None:
    """Missing last rows of the output matrix leave the first sixteen logits right: the sketch tells them, and only them."""
    fault = ("part-missing", {"part": 32, "axis": "rows", "at": ("logits",)}, None)
    explanation = explain(engine.dump(Planted((fault,)), PROMPT, bare=False), engine.model)
    assert explanation.remaining is None
    assert [(cause.named.fault, cause.named.parameters["part"]) for cause in explanation.causes] == [("part-missing", 32)]


@pytest.mark.usefixtures("computed")
def test_out_of_time_is_said(engine: Faulty) -> None:
    """A budget that is too short ends the search and says so."""
    explanation = explain(only(engine, ("activation", {}, (2,))), engine.model, ExplainOptions(budget=100))
    assert not explanation.complete
    assert explanation.remaining is not None


def _written(dump: Dump, path: Path, header: Header | None) -> Path:
    with Writer(path, header) as writer:
        for rows in dump.points.values():
            writer.rows(rows)
    return path


def test_the_command_answers_in_text_and_json(parity: Cli, engine: Faulty, tmp_path: Path) -> None:
    """Exit code 1 for a named fault, 0 for none; the JSON has the design's keys."""
    dump = only(engine, ("rope-pairs", {}, None))
    path = _written(dump, tmp_path / "ours.jsonl", dump.header)
    code, answer = parity.json("explain", path, "--model", engine.model)
    assert code == 1
    assert {"causes", "leads", "precision_only"} <= answer.keys()
    assert {"fault", "parameters", "layers", "explained", "nmse", "equivalent"} <= answer["causes"][0].keys()
    assert answer["causes"][0]["fault"] == "rope-pairs"
    json.dumps(answer, allow_nan=False)
    text = parity("explain", path, "--model", engine.model)
    assert text.out.startswith("cause   rope-pairs: ")
    right = only(engine)
    fine = parity("explain", _written(right, tmp_path / "right.jsonl", right.header), "--model", engine.model)
    assert (fine.code, fine.out.splitlines()[0][:8]) == (0, "no fault")


def test_wrong_requests_are_one_line(parity: Cli, engine: Faulty, tmp_path: Path) -> None:
    """No dump, no tokens, another model, another prompt, a reference that our engine contradicts: exit 2 with what to do."""
    dump = only(engine)
    bare = _written(dump, tmp_path / "bare.jsonl", None)
    assert dump.header is not None
    own = _written(dump, tmp_path / "own.jsonl", replace(dump.header, prompt="Once"))
    other = _written(dump, tmp_path / "other.jsonl", replace(dump.header, prompt="Twice"))
    wrong = only(engine, ("rope-pairs", {}, None))
    ref = _written(wrong, tmp_path / "ref.jsonl", wrong.header)
    for arguments, message in (
        (("explain",), "no dump was given"),
        (("explain", bare, "--model", engine.model), "does not say which tokens"),
        (("explain", own), "model"),
        (("explain", own, "--model", engine.model, "--ref", ref), "cannot replace llama.cpp"),
        (("explain", own, "--model", engine.model, "--ref", other), "different prompts"),
        (("explain", bare, "--model", engine.model, "--tokens", "1,2"), "tokens"),
        (("explain", own, "--model", engine.model, "--budget", "nan"), "--budget must be a finite number of seconds"),
    ):
        ran = parity(*arguments)
        assert ran.code == 2, arguments
        assert message in ran.err, ran.err
        assert "Traceback" not in ran.err


def test_the_catalogue_is_listed(parity: Cli) -> None:
    """--list prints every entry, as text and as JSON."""
    text = parity("explain", "--list")
    assert text.code == 0
    assert all(f"\n  {name}\n" in text.out for name in CATALOGUE)
    assert len(parity.json("explain", "--list")[1]["faults"]) == len(CATALOGUE)
    refused(parity("explain", "--list", "ours.jsonl"), "--list takes no dump")


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_garbage_at_single_logits_is_named_with_their_ids(engine: Faulty) -> None:
    """No fault that could be planted makes random numbers: that all else agrees names the rows of the output matrix."""

    def garbage(x: Array, weight: Array, bias: Array | None = None) -> Array:
        product = ops.linear(x, weight, bias)
        product[:, [3, 7]] = np.random.default_rng(1).standard_normal((len(x), 2))
        return product

    steps = [replace(step, op=garbage) if step.makes == "logits" else step for step in engine.right]
    dump = engine.dump(RIGHT, PROMPT, steps=steps)
    explanation = explain(dump, engine.model, STEPS)
    assert [(cause.named.fault, cause.named.parameters) for cause in explanation.causes] == [
        ("logits-garbage", {"ids": [3, 7]})
    ]
    assert (explanation.remaining, explanation.next) == (None, "")
