"""Values that a comparison did not see acquit nothing; differences that a type or a near tie explains are not blamed on an operation."""

import numpy as np
import pytest
from dumps import HEADER, Arrays, dump, noisy, random, spoiled
from msgspec.structs import replace
from planted import TOKENS, Faulty, Planted

from checkpoints.answers.diff import Limits
from checkpoints.dataflow import Computation, Dataflow
from checkpoints.record import Dump
from engine.replay.precision import ROUNDINGS
from parity.diff.compare import Options, compare
from parity.explain.on_model import compared_on
from reports.sentences import reasons, remarks, rows_seen

F32 = Options(compute="f32")


def bare(dump: Dump, size: int = 16) -> Dump:
    """A dump of leading values and nothing else."""
    points = {
        name: replace(rows, values=rows.values[:, :size], counts=np.minimum(rows.counts, size), sketch=None, stats={})
        for name, rows in dump.points.items()
    }
    return replace(dump, points=points, header=None)


@pytest.fixture(scope="module")
def sides(faulty: Faulty) -> tuple[Dump, Dump]:
    """A right engine, and one that maps query heads to key heads in turn instead of in groups, at every point."""
    wrong = Planted((("gqa-modulo", {}, None),))
    return (
        faulty.dump(Planted(()), TOKENS, points="all", size=16, bare=False),
        faulty.dump(wrong, TOKENS, points="all", size=16, bare=False),
    )


def test_inputs_that_agree_in_sixteen_values_acquit_nothing(sides: tuple[Dump, Dump]) -> None:
    """Heads mapped in turn leave the first head right: attn_out is not called wrong, and whole rows are asked for; with a sketch
    attention itself is named, and it is said that its recorded values agree."""
    right, wrong = sides
    kept = {name: rows for name, rows in wrong.points.items() if not name.endswith((".kq", ".kq_soft_max"))}
    wrong = replace(wrong, points=kept)
    verdict = compare(bare(wrong), right, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.0.attn_out"
    assert "this operation is wrong" not in verdict.operation
    assert "16 of 256 values of blk.0.kqv_out" in verdict.operation
    assert verdict.next_slice == 256
    assert "kqv_out" in verdict.next
    assert rows_seen(verdict.seen).startswith("16 of 64 to 512 values per row, no sketch; logits 16 of 2,048")
    whole = compare(wrong, right, F32)
    assert whole.first_divergence is not None
    assert whole.first_divergence.checkpoint == "blk.0.kqv_out"
    assert rows_seen(whole.seen) == ""
    assert dict(reasons(whole))["values"].startswith("the recorded ones agree; the rest of the row differs")
    assert "values" not in dict(reasons(verdict))


def test_another_product_of_the_same_row_shows_that_it_is_right(sides: tuple[Dump, Dump]) -> None:
    """Sixteen values of the norm agree, and so do queries and keys, each made of all of it: then the values' product is wrong."""
    right, _ = sides
    rows = right.points["blk.2.v"]
    wrong = {**right.points, "blk.2.v": replace(rows, values=rows.values[:, ::-1].copy())}
    order = list(right.points)
    for name in order[order.index("blk.2.v") + 1 :]:
        if name not in ("blk.2.q", "blk.2.k", "blk.2.q_rope", "blk.2.k_rope", "blk.2.k_read", "blk.2.kq", "blk.2.kq_soft_max"):
            wrong[name] = replace(right.points[name], values=right.points[name].values * np.float32(1.01))
    verdict = compare(bare(replace(right, points=wrong)), right, F32)
    assert verdict.operation == "blk.2.v is computed from blk.2.attn_norm, which agrees: this operation is wrong"


@pytest.mark.slow
def test_next_names_what_is_missing_and_not_the_same_glob(sides: tuple[Dump, Dump]) -> None:
    """At kqv_out, with everything else of the layer recorded, kq and kq_soft_max are asked for by name, and V is not suspected."""
    right, wrong = sides
    kept = {name: rows for name, rows in wrong.points.items() if not name.endswith((".kq", ".kq_soft_max"))}
    verdict = compare(replace(wrong, points=kept), right, F32)
    assert "*" not in verdict.next
    assert {"kq", "kq_soft_max", "kqv_out"} <= set(verdict.next.partition("{")[2].rstrip("}").split(","))
    assert verdict.pattern is not None
    assert "FFN" not in verdict.pattern.sentence
    named = compare(wrong, right, F32)
    assert named.first_divergence is not None
    assert named.first_divergence.checkpoint == "blk.0.kq"
    assert "which key or value head" in (named.pattern.sentence if named.pattern else "")
    assert named.next == ""


@pytest.mark.parametrize(("kind", "message"), [("f16", "F16"), ("bf16", "BF16"), ("tf32", "TF32"), ("q8", "8 bits per block")])
def test_the_step_of_a_type_is_seen_before_a_pattern_is_told(faulty: Faulty, kind: str, message: str) -> None:
    """An embedding kept in a lower type, declared as float32, is the type's rounding and no dequantisation at fault."""
    right = faulty.dump(Planted(()), TOKENS, size=4096, bare=False)
    rounded = ROUNDINGS[kind](right.points["embd"].values * np.float32(1.2345678))
    exact = right.points["embd"].values * np.float32(1.2345678)
    ref = replace(right, points={**right.points, "embd": replace(right.points["embd"], values=exact, stats={}, sketch=None)})
    ours = replace(ref, points={**ref.points, "embd": replace(ref.points["embd"], values=rounded)})
    verdict = compare(ours, ref, replace(F32, strict=True))
    assert verdict.pattern is not None
    assert verdict.pattern.code == "rounded"
    assert message in verdict.pattern.sentence


@pytest.mark.slow
def test_an_engine_with_8_bit_activations_is_judged_as_one(faulty: Faulty) -> None:
    """W8A8, not declared: no embedding row is blamed; declared or measured it is parity."""
    from engine.replay.precision import rounded

    right = faulty.dump(Planted(()), TOKENS, bare=False)
    ours = faulty.dump(Planted(()), TOKENS, steps=rounded(faulty.right, "q8", storage=False))
    ours = replace(ours, header=None)
    undeclared = compare(ours, right)
    assert undeclared or (undeclared.pattern is not None and "embedding row" not in undeclared.pattern.sentence)
    assert compare(ours, right, Options(compute="q8"))
    measured = compared_on(ours, right, Options(), faulty.model).verdict
    assert measured
    assert measured.precision is not None
    assert (measured.precision.arithmetic, measured.precision.assumed) == ("q8", False)


ROUTER = {
    "embd": Computation("GET_ROWS"),
    "blk.0.ffn_moe_probs": Computation("SOFT_MAX", ("embd",)),
    "blk.0.ffn_moe_topk": Computation("ARGSORT", ("blk.0.ffn_moe_probs",)),
    "blk.0.ffn_moe_gate": Computation("MUL_MAT_ID", ("embd", "blk.0.ffn_moe_topk")),
    "blk.0.ffn_moe_out": Computation("ADD", ("blk.0.ffn_moe_gate",)),
    "blk.0.l_out": Computation("ADD", ("blk.0.ffn_moe_out", "embd")),
    "logits": Computation("MUL_MAT", ("blk.0.l_out",), ("output.weight",)),
}


def routing(gap: float) -> tuple[Arrays, Arrays]:
    """Two sides of a router of 8 experts that differ in the second of two at position 4, whose scores are `gap` apart."""
    ref = random(tuple(ROUTER), positions=8)
    ref["blk.0.ffn_moe_probs"] = np.tile(np.linspace(0.8, 0.1, 8, dtype=np.float32), (8, 1))
    ref["blk.0.ffn_moe_probs"][4, 2] = ref["blk.0.ffn_moe_probs"][4, 1] - np.float32(gap)
    ref["blk.0.ffn_moe_topk"] = np.tile(np.array([0, 1], dtype=np.float32), (8, 1))
    ours = spoiled(ref, ("blk.0.ffn_moe_gate", "blk.0.ffn_moe_out", "blk.0.l_out", "logits"), [4], 1.0)
    ours["blk.0.ffn_moe_topk"] = ref["blk.0.ffn_moe_topk"].copy()
    ours["blk.0.ffn_moe_topk"][4] = (0, 2)
    return ours, ref


def both(gap: float) -> tuple[Dump, Dump]:
    ours, ref = routing(gap)
    header = replace(HEADER, dataflow=Dataflow(ROUTER).to_json())
    return dump(noisy(ours) | {"blk.0.ffn_moe_topk": ours["blk.0.ffn_moe_topk"]}, header=header), dump(ref, header=header)


def test_a_near_tie_that_flips_is_said_and_is_no_divergence() -> None:
    """Experts whose scores are closer than the limit may be exchanged: what they compute is left out, and it is said."""
    verdict = compare(*both(1e-7))
    assert verdict
    assert verdict.compared == 8 * len(ROUTER) - 5
    assert any("ours takes expert 2, the reference 1: a near tie" in remark for _, remark in remarks(verdict))


def test_another_expert_is_a_divergence() -> None:
    """Experts whose scores are far apart are no tie: the choice itself is called wrong."""
    verdict = compare(*both(0.05))
    assert verdict.first_divergence is not None
    assert (verdict.first_divergence.checkpoint, verdict.first_divergence.token_idx) == ("blk.0.ffn_moe_topk", 4)
    assert "which experts are chosen" in (verdict.pattern.sentence if verdict.pattern else "")


def test_the_order_of_experts_is_none() -> None:
    """The same experts in another order are the same choice; what they compute in another order cannot be compared."""
    ours, ref = routing(0.05)
    ours = {name: ref[name].copy() for name in ours}
    ours["blk.0.ffn_moe_topk"] = ours["blk.0.ffn_moe_topk"][:, ::-1].copy()
    ours["blk.0.ffn_moe_gate"] = np.roll(ours["blk.0.ffn_moe_gate"], 32, axis=1)
    header = replace(HEADER, dataflow=Dataflow(ROUTER).to_json())
    verdict = compare(dump(ours, header=header), dump(ref, header=header))
    assert verdict
    assert any("another order" in note for note in verdict.notes)


def test_a_copy_of_the_ids_is_in_their_order() -> None:
    """A node without a telling name that is made from the chosen ids alone is in their order; what is made from their sum is not."""
    flow = {**ROUTER, "blk.0.scale": Computation("SCALE", ("blk.0.ffn_moe_topk",))}
    ref = {**random(tuple(flow), positions=8), **routing(0.05)[1]}
    ref["blk.0.scale"] = ref["blk.0.ffn_moe_topk"] / np.float32(2)
    ours = {name: values.copy() for name, values in ref.items()}
    for name in ("blk.0.ffn_moe_topk", "blk.0.scale"):
        ours[name] = ours[name][:, ::-1].copy()
    header = replace(HEADER, dataflow=Dataflow(flow).to_json())
    assert compare(dump(ours, header=header), dump(ref, header=header))
    for name in ("blk.0.l_out", "logits"):
        ours[name] *= np.float32(1.1)
    first = compare(dump(ours, header=header), dump(ref, header=header)).first_divergence
    assert first is not None
    assert first.checkpoint == "blk.0.l_out"


@pytest.mark.parametrize(("gap", "code"), [(1e-3, "undecided"), (0.4, "single-positions")])
def test_other_experts_beside_noise_of_8_bits_blame_no_operation(gap: float, code: str) -> None:
    """Undeclared 8 bits are over the assumed limit at some positions and choose another expert at one: a near tie is said to allow it."""
    _, ref = routing(gap)
    ref["blk.0.ffn_moe_probs"][4, 3:] = 0
    ours = {name: spoiled(ref, (name,), [1, 3], 0.02)[name] for name in ("embd", "blk.0.l_out")}
    ours["embd"] = ref["embd"]
    ours["blk.0.l_out"][4] += ref["blk.0.l_out"][3]
    header = replace(HEADER, dataflow=Dataflow(ROUTER).to_json())
    verdict = compare(replace(dump(ours, header=header), header=None), dump(ref, header=header))
    assert verdict.pattern is not None
    assert verdict.pattern.code == code


@pytest.mark.parametrize(("gap", "code"), [(1e-3, "undecided"), (0.4, "single-positions")])
def test_other_experts_beyond_measured_limits_blame_no_operation(gap: float, code: str) -> None:
    """In a stated arithmetic whose measured limits a single position exceeds by far, a near tie of experts is said to allow it."""
    _, ref = routing(gap)
    ref["blk.0.ffn_moe_probs"][4, 3:] = 0
    ours = {name: ref[name].copy() for name in ("embd", "blk.0.l_out")}
    ours["blk.0.l_out"][4] += ref["blk.0.l_out"][3]
    header = replace(HEADER, dataflow=Dataflow(ROUTER).to_json())
    stated = replace(HEADER, source="an engine", compute="bf16")
    allowed = Limits(0.3, 0.3, "measured", points={"blk.0.l_out": 0.3})
    verdict = compare(dump(ours, header=stated), dump(ref, header=header), Options(compute="bf16", limits=allowed))
    assert verdict.pattern is not None
    assert verdict.pattern.code == code
    assert "--model" not in verdict.pattern.sentence


def test_chosen_experts_tell_nothing_of_their_scores() -> None:
    """Scores that are wrong and choose the same experts: the operation is called wrong, and not the record."""
    _, ref = routing(0.05)
    ours = {name: ref[name].copy() for name in ref}
    ours["blk.0.ffn_moe_probs"] *= np.float32(1.05) + np.float32(0.01) * np.arange(8, dtype=np.float32)[::-1]
    header = replace(HEADER, dataflow=Dataflow(ROUTER).to_json())
    verdict = compare(dump(ours, header=header), dump(ref, header=header))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.0.ffn_moe_probs"
    assert not verdict.record_faults


GROUPS = ROUTER | {
    "blk.0.get_rows": Computation("GET_ROWS", ("blk.0.ffn_moe_probs",)),
    "blk.0.ffn_moe_topk": Computation("ARGSORT", ("blk.0.get_rows",)),
}


@pytest.mark.parametrize(("gap", "agrees"), [(1e-7, True), (0.05, False)])
def test_a_near_tie_among_experts_of_chosen_groups(gap: float, agrees: bool) -> None:
    """Where only some experts' scores are sorted, those of all tell how near the exchanged ones are."""
    ours, ref = ({**side, "blk.0.get_rows": side["blk.0.ffn_moe_probs"][:, ::4]} for side in routing(gap))
    values = {name: GROUPS[name] for name in ("embd", "blk.0.ffn_moe_probs", "blk.0.get_rows", *list(ROUTER)[2:])}
    header = replace(HEADER, dataflow=Dataflow(values).to_json())
    ours = noisy(ours) | {"blk.0.ffn_moe_topk": ours["blk.0.ffn_moe_topk"]}
    assert bool(compare(dump(ours, header=header), dump(ref, header=header))) == agrees
