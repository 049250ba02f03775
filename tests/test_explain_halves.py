"""`explain` of encoder–decoders: faults of the encoder, of the decoder, of what one reads of the other; and of encoders alone."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_files import File
from cli import Cli
from explaining import STEPS, unstated
from fault_places import HALVES
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, tokens_of

from checkpoints.answers.explain import Cause, DivergentPlace, Explanation, Named
from checkpoints.reading.reader import read
from engine.faults import CATALOGUE, as_recorded, plant
from engine.faults.edits import Then
from engine.graph import Step
from engine.halves import as_encoder, decoder_alone, encoder_alone
from engine.inapplicable import NotApplicable
from engine.opened import open_plain
from engine.replay.precision import rounded
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.explain.explain import explain
from parity.explain.halves import joined
from parity.run.ours import OursJob
from parity.run.ours import dump as write_dump
from reference.client import Reference
from reference.jobs import DumpJob

IDS, GENERATED = (3, 44, 5, 60, 7, 18, 9), (5, 9, 31, 77)
Make = Callable[..., Path]
Planting = tuple[str, dict[str, Any], tuple[int, ...] | None]


@pytest.fixture(scope="module")
def engine(small_model: Make, reference: Reference) -> Transformer:
    model = small_model("t5", layers=3)
    return open_plain(GgufModel(model), "numpy", recorded=partial(reference.graph, model))


def _with(steps: Sequence[Step], fault: Planting | None) -> list[Step]:
    if fault is None:
        return list(steps)
    name, parameters, layers = fault
    return as_recorded(plant(steps, CATALOGUE[name], layers, **parameters))


def explained(
    engine: Transformer,
    out: Path,
    encoder: Planting | None = None,
    decoder: Planting | None = None,
    points: str = "default",
    *,
    handed_over: Planting | None = None,
) -> Explanation:
    """The explanation of sixteen values per record of an engine with these faults."""
    right = engine.encoder or (), engine.steps
    try:
        engine.encoder = as_encoder(_with(encoder_alone(right[0]), encoder))
        if handed_over is not None:  # the decoder reads the last value of the encoder's pass
            changed = _with(decoder_alone(right[0], right[1]), handed_over)[0]
            engine.encoder = [*engine.encoder, replace(changed, makes="enc.handed")]
        engine.steps = _with(right[1], decoder)
        with np.errstate(all="ignore"):
            write_dump(engine, OursJob(out, IDS, generated=GENERATED, points=points))
    finally:
        engine.encoder, engine.steps = right
    dump = read(out)
    dump = replace(dump, points={name: replace(rows, sketch=None, stats={}) for name, rows in dump.points.items()})
    return explain(dump, engine.model.path, PATIENT)


def named(explanation: Explanation) -> list[str]:
    assert explanation.remaining is None
    return [cause.named.fault for cause in explanation.causes]


@pytest.mark.slow
@pytest.mark.parametrize("points", ["default", "all"])
def test_no_fault_in_a_right_engine(engine: Transformer, tmp_path: Path, points: str) -> None:
    """Both halves are judged, and nothing is wrong."""
    explanation = explained(engine, tmp_path / "ours.jsonl", points=points)
    assert explanation
    assert {seen.checkpoint for seen in explanation.seen} >= {"enc.embd", "enc.output_norm", "embd", "logits"}


@pytest.mark.slow
def test_a_fault_of_the_encoder_is_not_held_against_the_decoder(engine: Transformer, tmp_path: Path) -> None:
    """What the decoder makes of a faulty encoder's rows is right: one cause, in the encoder, by the encoder's own names."""
    explanation = explained(engine, tmp_path / "ours.jsonl", encoder=("transposed", {"at": ("v",)}, (1,)))
    assert named(explanation) == ["transposed"]
    assert explanation.causes[0].named.sentence.startswith("in the encoder, ")
    assert explanation.causes[0].named.layers == (1,)
    assert explanation.first is not None
    assert explanation.first.checkpoint == "enc.blk.2.l_out"


@pytest.mark.slow
def test_a_fault_of_the_decoder(engine: Transformer, tmp_path: Path) -> None:
    """The encoder agrees, and the decoder's matrix is named in its layer."""
    explanation = explained(engine, tmp_path / "ours.jsonl", decoder=("transposed", {"at": ("attn_out",)}, (1,)))
    assert named(explanation) == ["transposed"]
    assert explanation.causes[0].named.sentence.startswith("in the decoder, ")
    assert explanation.causes[0].named.layers == (1,)


def test_an_encoder_has_no_causal_mask_to_lose(engine: Transformer) -> None:
    """Its positions see later ones in a right engine: a missing causal mask is a cause in the decoder alone."""
    assert plant(engine.steps, CATALOGUE["no-causal-mask"]) != list(engine.steps)
    with pytest.raises(NotApplicable):
        plant(encoder_alone(engine.encoder or ()), CATALOGUE["no-causal-mask"])


@pytest.mark.slow
def test_a_decoders_embedding_that_follows_no_law_ends_in_an_answer(engine: Transformer, tmp_path: Path) -> None:
    """What the encoder hands over has another number of rows than the decoder's values, and is not compared with them."""
    right = engine.steps
    mixing = np.eye(128, dtype=np.float32) + np.float32(0.05) * np.random.default_rng(3).standard_normal((128, 128), np.float32)
    try:
        engine.steps = [
            replace(step, op=Then(step.op, lambda x: x @ mixing)) if step.makes == "embd" else step for step in right
        ]
        answer = explained(engine, tmp_path / "ours.jsonl")
    finally:
        engine.steps = right
    assert answer.placed is not None
    assert (answer.placed.operations, answer.causes) == (("embd",), ())


def test_the_decoders_own_arithmetic_is_noted_after_a_faulty_encoder() -> None:
    """The encoder's cause is the answer: that what is left of the decoder is lower arithmetic is said beside it."""
    place = DivergentPlace("blk.0.l_out", 0, 1e-5, 1e-10)
    cause = Cause(Named("transposed", {"at": ("v",)}, None, "in the encoder, v is transposed"), 1.0, 3, 1e-13, "", "", "")
    encoder = Explanation(records=3, differing=3, first=place, last_agreement=None, causes=(cause,))
    decoder = Explanation(records=2, differing=2, first=place, last_agreement=None, remaining=place, precision_only="bf16")
    both = joined(encoder, decoder)
    assert [cause.named.fault for cause in both.causes] == ["transposed"]
    assert "the decoder's own differences are those of bf16 arithmetic" in both.notes


@pytest.mark.slow
def test_a_fault_of_both_halves_is_one_cause(engine: Transformer, tmp_path: Path) -> None:
    """What every layer of both halves has is named once."""
    fault: Planting = ("norm-weight-missing", {"at": ("ffn_norm",)}, None)
    explanation = explained(engine, tmp_path / "ours.jsonl", encoder=fault, decoder=fault)
    assert named(explanation) == ["norm-weight-missing"]
    assert explanation.causes[0].named.sentence.startswith("in both halves, ")
    assert explanation.causes[0].explained == 1


@pytest.mark.slow
def test_a_fault_in_each_half(engine: Transformer, tmp_path: Path) -> None:
    """Two faults, one a half, are both named."""
    explanation = explained(
        engine,
        tmp_path / "ours.jsonl",
        encoder=("norm-skipped", {"at": ("ffn_norm",)}, None),
        decoder=("transposed", {"at": ("v",)}, (1,)),
    )
    assert named(explanation) == ["norm-skipped", "transposed"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, ("transposed", {"at": ("v",)}, (1,))])
@pytest.mark.usefixtures("computed")
def test_lower_arithmetic_of_the_encoder_does_not_acquit_the_decoder(
    engine: Transformer, tmp_path: Path, fault: Planting | None
) -> None:
    """An encoder in BF16 that does not say so is no fault; the decoder after it is judged all the same."""
    right = engine.encoder or (), engine.steps
    try:
        engine.encoder = as_encoder(rounded(encoder_alone(right[0]), "bf16", storage=False))
        engine.steps = rounded(_with(right[1], fault), "bf16", storage=False)
        write_dump(engine, OursJob(tmp_path / "ours.jsonl", IDS, generated=GENERATED))
    finally:
        engine.encoder, engine.steps = right
    explanation = explain(
        unstated(read(tmp_path / "ours.jsonl")), engine.model.path, replace(STEPS, budget=1e9) if fault is None else STEPS
    )
    assert bool(explanation) is (fault is None)
    assert (explanation.precision_only, explanation.looks_like) == ("bf16" if fault is None else "", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", HALVES)
def test_what_only_encoder_decoders_can_have(engine: Transformer, tmp_path: Path, name: str) -> None:
    """Each fault of what one half reads of the other, of cross-attention and of relative positions is named."""
    where, parameters = HALVES[name]
    planting: dict[str, Any] = {where.replace(" ", "_"): (name, parameters, None)}
    explanation = explained(engine, tmp_path / "ours.jsonl", **planting)
    assert len(explanation.causes) == 1
    assert explanation.remaining is None
    assert name in {explanation.causes[0].named.fault, *(other.fault for other in explanation.causes[0].equivalent)}
    assert all((CATALOGUE[name].symptom, CATALOGUE[name].fix, CATALOGUE[name].seen))


@pytest.mark.slow
def test_an_encoder_that_was_not_recorded(engine: Transformer, tmp_path: Path) -> None:
    """A decoder's fault is named without the encoder's records, and the answer says what was not seen."""
    explanation = explained(
        engine, tmp_path / "ours.jsonl", decoder=("transposed", {"at": ("v",)}, (1,)), points="blk.*.l_out,logits"
    )
    assert named(explanation) == ["transposed"]
    assert any("the encoder was not recorded" in note for note in explanation.notes)


@pytest.mark.slow
def test_llama_cpps_dump_is_explained_and_checks_our_engine(
    parity: Cli, engine: Transformer, reference: Reference, tmp_path: Path
) -> None:
    """`explain --ref` holds both halves to llama.cpp's dump, which has no fault itself."""
    ref = tmp_path / "ref.jsonl"
    reference.dump(DumpJob(engine.model.path, ref, IDS, lead=GENERATED))
    code, answer = parity.json("explain", ref, "--model", engine.model.path, "--ref", ref)
    assert code == 0
    assert answer["verdict"] == "no fault"


@pytest.mark.parametrize(
    ("fault", "layers"),
    [
        pytest.param(("transposed", {"at": ("v",)}), None, marks=pytest.mark.slow),
        pytest.param(("layer-offset", {"by": 1, "at": ("attn_norm",)}), (0,), marks=pytest.mark.slow),
    ],
)
def test_an_encoder_alone_is_replayed_over_all_of_its_rows(
    small_model: Make, reference: Reference, fault: tuple[str, dict[str, Any]], layers: tuple[int, ...] | None
) -> None:
    """Later positions act on earlier ones there: the first rows alone would contradict every cause."""
    model = small_model("t5encoder", layers=3)
    engine = Faulty(model, reference.graph(model))
    tokens = tokens_of(model, 9, seed=4)
    explanation = explain(engine.dump(Planted(((*fault, layers),)), tokens), model, replace(PATIENT, tokens=tokens))
    assert named(explanation) == [fault[0]]


@pytest.mark.slow
def test_a_table_of_the_encoder_is_no_fault_of_the_decoder(reference: Reference, small_model: Make, tmp_path: Path) -> None:
    """llama.cpp with another ε in both halves: what its encoder's GELU table rounds is handed over, and no further number is made of it."""
    model = small_model("t5", kind="f32")
    changed = File(model)
    changed.set("attention.layer_norm_rms_epsilon", 1e-5)
    changed.write(tmp_path / "changed.gguf")
    reference.dump(DumpJob(tmp_path / "changed.gguf", tmp_path / "ref.jsonl", IDS, points="all"))
    explanation = explain(read(tmp_path / "ref.jsonl"), model, replace(PATIENT, compute="f32"))
    assert (set(named(explanation)), explanation.remaining) == ({"norm-epsilon"}, None)
