"""What each point is made from: by the vocabulary's order, by a dump's header, and by llama.cpp's graph."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from dumps import HEADER, dump, noisy, random, spoiled
from msgspec.structs import replace

from checkpoints.dataflow import CACHE, Computation, Dataflow, of_vocabulary
from checkpoints.points import LAYER_KINDS, in_layer
from checkpoints.reading.reader import read
from engine.backend import choose
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.diff.compare import compare, comparison
from parity.diff.measured.dataflow import flow, ordered, without_mask
from parity.lint.lint import lint
from parity.models.embedded import path as embedded
from parity.run.ours import OursJob
from parity.run.ours import dump as run_ours
from reference.client import Reference
from reference.jobs import DumpJob

# A layer as Cohere builds it: attention and feed-forward side by side, both of one norm.
PARALLEL = {
    "embd": Computation("GET_ROWS", (), ("token_embd.weight",)),
    "blk.0.attn_norm": Computation("NORM", ("embd",), ("blk.0.attn_norm.weight",)),
    "blk.0.attn_out": Computation("MUL_MAT", ("blk.0.attn_norm",), ("blk.0.attn_output.weight",)),
    "blk.0.ffn_out": Computation("MUL_MAT", ("blk.0.attn_norm",), ("blk.0.ffn_down.weight",)),
    "blk.0.l_out": Computation("ADD", ("blk.0.attn_out", "blk.0.ffn_out", "embd")),
    "logits": Computation("MUL_MAT", ("blk.0.l_out",), ("output.weight",)),
}


def test_the_vocabularys_order() -> None:
    """Branches that have not met do not read each other; residual sums read both of their operands."""
    origins = of_vocabulary(["blk.1.l_out"], 2).computations
    assert origins["blk.0.kq"].reads == ("blk.0.q_rope", "blk.0.k_rope")
    assert origins["blk.0.kqv_out"].reads == ("blk.0.v", "blk.0.kq_soft_max")
    assert origins["blk.0.ffn_swiglu"].reads == ("blk.0.ffn_gate", "blk.0.ffn_up")
    assert origins["blk.1.ffn_inp"].reads == ("blk.1.attn_out", "blk.0.l_out")
    assert origins["blk.1.l_out"].reads == ("blk.1.ffn_out", "blk.1.ffn_inp")
    assert origins["output_norm"].reads == ("blk.1.l_out",)
    place = {name: number for number, name in enumerate(origins)}
    assert all(place[other] < place[name] for name, how in origins.items() for other in how.reads)
    optional = {kind.name for kind in LAYER_KINDS if kind.optional}
    assert not optional & {name.rpartition(".")[2] for name in origins}
    assert of_vocabulary(["blk.0.q_norm"], 1).computations["blk.0.q_rope"].reads == ("blk.0.q_norm",)


def test_a_mask_is_seen_in_the_references_scores(tmp_path: Path) -> None:
    """A first pass of one position shows neither a mask nor the lack of one; the reference's scores decide, whatever ours look like."""
    engine = Transformer(GgufModel(embedded()), choose("numpy"))
    for tokens, generated, unmasked in (((5,), (7, 8, 9), None), ((5, 6, 7, 8), (), False)):
        job = OursJob(tmp_path / f"{len(tokens)}.jsonl", tokens, points="blk.0.{kq_soft_max,l_out}", generated=generated)
        run_ours(engine, job)
        assert without_mask(read(job.out).points) is unmasked
    ref = read(tmp_path / "4.jsonl")
    scores = ref.points["blk.0.kq_soft_max"]
    wide = {"blk.0.kq_soft_max": replace(scores, shapes=(max(scores.shapes),) * len(scores))}
    assert without_mask(wide) is True
    assert not comparison(replace(ref, points=ref.points | wide), ref).records.flow.unmasked


def test_it_survives_a_header() -> None:
    """In JSON, layers that are made alike are listed once; damaged data are refused with the reason."""
    whole = of_vocabulary([], 40)
    plain = json.loads(json.dumps(whole.to_json()))
    assert list(plain) == ["", "0", "1..39"]
    again = Dataflow.from_json(plain)
    assert list(again.computations.items()) == list(whole.computations.items())
    function = Dataflow({"embd": Computation("GET_ROWS"), "blk.0.act": Computation("UNARY", ("embd",), (), "GELU")})
    assert function.to_json()["0"] == {"act": ["UNARY:GELU", ["embd"], []]}
    assert Dataflow.from_json(function.to_json()).computations == function.computations
    for damaged in (
        {"0": {"q": ["MUL_MAT", [".strange"], []]}},
        {"0": {"q": ["MUL_MAT", [".q"], []]}},
        {"0": {"q": "MUL_MAT"}},
        {"0": 1},
        {"5..2": {}},
        {"0..999999999": {}},
        {"x": {}},
    ):
        with pytest.raises(ValueError, match=r"dataflow|span"):
            Dataflow.from_json(damaged)


def test_any_architecture_by_its_own_graph() -> None:
    """Two parallel branches have two origins, and the operation is named by what the header says, not by the vocabulary."""
    plain = Dataflow(PARALLEL).to_json()
    names = tuple(PARALLEL)
    ref = random(names)
    wrong = spoiled(noisy(ref), ("blk.0.attn_out", "blk.0.ffn_out", "blk.0.l_out", "logits"), slice(None))
    verdict = compare(dump(wrong), dump(ref, header=replace(HEADER, dataflow=plain)))
    assert [origin.first.checkpoint for origin in verdict.origins] == ["blk.0.attn_out", "blk.0.ffn_out"]
    assert verdict.operation == "blk.0.attn_out is computed from blk.0.attn_norm, which agrees: this operation is wrong"
    assert verdict.pattern is not None
    assert "blk.0.attn_output.weight" in verdict.pattern.sentence
    assert ordered(["logits", "blk.0.ffn_out", "blk.0.attn_out"], Dataflow(PARALLEL)) == [
        "blk.0.attn_out", "blk.0.ffn_out", "logits"
    ]  # fmt: skip


def test_a_damaged_header_falls_back() -> None:
    """A dataflow that cannot be read leads to a note from diff and lint; the comparison still runs."""
    ref = random()
    verdict = compare(dump(noisy(ref)), dump(ref, header=replace(HEADER, dataflow={"0": {"q": 1}})))
    assert verdict
    assert any("vocabulary's order" in note for note in verdict.notes)
    assert any(
        "dataflow is ignored" in note for note in lint(dump(ref, header=replace(HEADER, dataflow={"0": {"q": 1}}))).notes
    )


def test_llama_cpps_graph(tmp_path: Path) -> None:
    """A reference's dump says what llama.cpp's graph says: for qwen2 that is the vocabulary's order, with weights and caches."""
    with Reference() as reference:
        reference.dump(DumpJob(embedded(), tmp_path / "ref.jsonl", (1, 2, 3)))
    header = read(tmp_path / "ref.jsonl").header
    assert header is not None
    assert header.dataflow is not None
    assert len(json.dumps(header.dataflow)) < 4096
    whole = Dataflow.from_json(header.dataflow)
    assert whole.computations["blk.7.k_read"] == Computation(CACHE, ("blk.7.k_rope",))
    assert whole.computations["blk.7.attn_out"].weights == ("blk.7.attn_output.weight",)
    assert (whole.computations["blk.7.ffn_swiglu"].op, whole.computations["blk.7.ffn_swiglu"].function) == ("GLU", "SWIGLU")
    every = tuple(name for name in of_vocabulary([], 24).computations)
    parents = [{name: sorted(names) for name, names in model.parents.items()} for model in (flow(every, whole), flow(every))]
    assert parents[0] == parents[1]
    unread = {name for name, readers in whole.readers.items() if not readers}
    assert unread == {"logits"}
    assert whole.part_of_next("blk.3.Qcur")
    assert not whole.part_of_next(in_layer(3, "q"))


def test_a_fused_product_is_read_by_its_parts(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """phi3 multiplies once for gate and up, and once for queries, keys and values: the parts are what follows is made from."""
    reference.dump(DumpJob(small_model("phi3"), tmp_path / "ref.jsonl", (5, 6, 7), points="all"))
    header = read(tmp_path / "ref.jsonl").header
    assert header is not None
    whole = Dataflow.from_json(header.dataflow or {})
    assert whole.computations["blk.0.ffn_swiglu"].reads == ("blk.0.ffn_gate", "blk.0.ffn_up")
    assert whole.computations["blk.0.ffn_gate"].reads == whole.computations["blk.0.ffn_up"].reads == ("blk.0.ffn_gate_up",)
    assert whole.part_of_next("blk.0.ffn_gate_up")
    assert [name for name, readers in whole.readers.items() if not readers] == ["logits"]


def test_copies_of_ggml_are_no_points_of_an_engine(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """mamba2's graph copies z without giving it a name: nothing asks an engine for "blk.0.cont.2", and it is no suspect."""
    reference.dump(DumpJob(small_model("mamba2"), tmp_path / "ref.jsonl", (5, 6, 7), points="all"))
    header = read(tmp_path / "ref.jsonl").header
    assert header is not None
    whole = Dataflow.from_json(header.dataflow or {})
    assert "blk.0.cont.2" in whole.computations["blk.0.glu"].reads
    assert whole.part_of_next("blk.0.cont.2")
    compared = tuple(name for name in whole.computations if name != "blk.0.cont.2")
    stretch = flow(compared, whole).between("blk.0.glu")
    assert stretch is not None
    assert stretch.unrecorded == ()
    assert set(stretch.inputs) == {"blk.0.ssm_in", "blk.0.mamba2_y_add_d"}


def test_experts_are_read_by_the_router(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """A mixture of experts says that the experts' products read what the router chose."""
    reference.dump(DumpJob(small_model("qwen3moe"), tmp_path / "ref.jsonl", (5, 6, 7), points="all"))
    dumped = read(tmp_path / "ref.jsonl")
    assert dumped.header is not None
    whole = Dataflow.from_json(dumped.header.dataflow or {})
    assert "blk.0.ffn_moe_topk" in whole.computations["blk.0.ffn_moe_gate"].reads
    assert whole.computations["blk.0.ffn_moe_topk"].op in ("ARGSORT", "TOP_K")
    assert compare(dumped, dumped)


@pytest.mark.parametrize(
    "plain",
    [
        {"0..99999": {"a": ["ADD", [], []]}},
        {"": {f"n{i}": ["ADD", [f"n{i - 1}"] if i else [], []] for i in range(30_000)}},
        {"": {"a": ["ADD", [], []], "b": ["ADD", ["a"] * 200_000, []]}},
    ],
    ids=["layers", "chain", "reads"],
)
def test_a_dataflow_beyond_any_model_is_refused(plain: dict[str, object]) -> None:
    """A header of some bytes can claim millions of points: it is refused before they are made."""
    with pytest.raises(ValueError, match="more than"):
        Dataflow.from_json(plain)
