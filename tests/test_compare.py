"""Faults planted in synthetic dumps: the verdict names the place, the origins, the pattern and what to record next."""

import numpy as np
import pytest
from dumps import DEFAULT, HEADER, dump, noisy, random, spoiled
from msgspec.structs import replace

from checkpoints.answers.diff import FRESH, INHERITED, Verdict
from checkpoints.dataflow import Computation, Dataflow
from checkpoints.errors import DumpError, InputError
from checkpoints.points import LAYER_KINDS, select
from checkpoints.record import Dump
from checkpoints.summary import summarise
from parity.diff.compare import Options, compare
from parity.diff.measured.dataflow import flow, upstream

# Every point of a model without query and key norms whose row does not grow with the position.
KINDS = [kind.name for kind in LAYER_KINDS if "t+1" not in kind.row and not kind.name.endswith(("q_norm", "k_norm"))]
ALL = ("embd", *(f"blk.{i}.{name}" for i in range(4) for name in KINDS), "output_norm", "logits")


def after(point: str, names: tuple[str, ...] = DEFAULT) -> tuple[str, ...]:
    """The point and everything later."""
    return names[names.index(point) :]


def judged(positions: slice | list[int], point: str = "blk.5.l_out", **how: int) -> Verdict:
    """The verdict on a dump that is wrong from this point on at these positions."""
    ref = random()
    return compare(dump(spoiled(noisy(ref), after(point), positions), **how), dump(ref, **how))


def test_noise_is_parity() -> None:
    """Two sides that differ by float32 noise agree, and the verdict is true."""
    ref = random()
    verdict = compare(dump(noisy(ref)), dump(ref))
    assert verdict
    assert verdict.compared == 7 * 12
    assert verdict.worst is not None
    assert 0 < verdict.worst.nmse < 1e-12  # type: ignore[operator]
    assert verdict.first_divergence is None
    assert verdict.origins == ()
    assert verdict.next == ""


def test_wrong_from_position_one() -> None:
    """Right at 0 and wrong from 1 on (a RoPE fault) is named as such, with the layers that it may lie in."""
    verdict = judged(slice(1, None))
    first = verdict.first_divergence
    assert first is not None
    assert not verdict
    assert (first.checkpoint, first.layer, first.token_idx, first.fresh) == ("blk.5.l_out", 5, 1, True)
    assert len(first.ours) == len(first.ref) == 16
    assert verdict.last_agreement is not None
    assert (verdict.last_agreement.checkpoint, verdict.last_agreement.positions) == ("blk.0.l_out", 12)
    assert verdict.pattern is not None
    assert verdict.pattern.code == "from-position-1"
    assert verdict.next == "blk.0.l_out,blk.{1..5}.*"
    assert [point.status for point in verdict.points[2:4]] == [FRESH, INHERITED]


@pytest.mark.parametrize(
    ("positions", "how", "code"),
    [
        (slice(None), {}, "from-position-0"),
        (slice(0, -1), {}, "causal-mask"),
        (slice(8, None), {"prefill": 8}, "decode"),
        (slice(6, None), {"chunk": 6}, "chunk"),
        ([5], {}, "single-positions"),
        ([0], {}, "first-position"),
        (slice(7, None), {}, "from-position-n"),
    ],
)
def test_pattern(positions: slice | list[int], how: dict[str, int], code: str) -> None:
    """The positions at which the first point is wrong give the pattern."""
    pattern = judged(positions, **how).pattern
    assert pattern is not None
    assert pattern.code == code


def test_single_positions_do_not_blame_an_embedding_that_agrees() -> None:
    """If embd is recorded and right, a few wrong positions further down are not blamed on its rows."""
    pattern = judged([5]).pattern
    assert pattern is not None
    assert "embd is right" in pattern.sentence


def test_pattern_of_one_embedding_row() -> None:
    """A single wrong row of the embedding is named with its token."""
    pattern = judged([3], "embd").pattern
    assert pattern is not None
    assert pattern.code == "embedding-row"


def test_only_the_logits() -> None:
    """A fault after the last norm is the output matrix's, and the operation is named."""
    verdict = judged(slice(None), "logits")
    assert verdict.operation == "logits is computed from output_norm, which agrees: this operation is wrong"
    assert verdict.next == ""


def test_operation_is_named_where_its_inputs_are_recorded() -> None:
    """With every point recorded, the first wrong one is made by the wrong operation, and no further points are asked for."""
    ref = random(ALL)
    wrong = [name for name in after("blk.2.q_rope", ALL) if name not in ("blk.2.k_rope", "blk.2.v")]
    verdict = compare(dump(spoiled(noisy(ref), wrong, slice(1, None))), dump(ref))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.2.q_rope"
    assert verdict.operation == "blk.2.q_rope is computed from blk.2.q, which agrees: this operation is wrong"
    assert verdict.pattern is not None
    assert verdict.pattern.code == "operation"
    assert "RoPE" in verdict.pattern.sentence
    assert verdict.next == ""


def test_what_inherits_an_error_from_below_the_limit_is_no_wrong_operation() -> None:
    """The last layer's output is 0.3 of its limit off, the norm after it 3: the fault lies before the former, where the error jumped."""
    ref = random(DEFAULT, positions=60)
    ours, direction = noisy(ref), np.random.default_rng(5)
    for name, error in (("blk.23.l_out", 3e-11), ("output_norm", 3e-10), ("logits", 3e-9)):
        size = np.float32(np.sqrt(error)) * ref[name].std()
        ours[name] = ref[name] + size * direction.standard_normal(ref[name].shape).astype(np.float32)
    verdict = compare(dump(ours), dump(ref), Options(compute="f32", strict=True))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "output_norm"
    assert "grew from that of blk.23.l_out without a jump, from below the limit" in verdict.operation
    assert "blk.{11..23}.*" in verdict.next


def test_missing_biases_have_three_origins() -> None:
    """Queries, keys and values do not spoil each other: a fault in all three has three origins."""
    ref = random(ALL)
    verdict = compare(dump(spoiled(noisy(ref), after("blk.1.q", ALL), slice(None))), dump(ref))
    assert [origin.first.checkpoint for origin in verdict.origins] == ["blk.1.q", "blk.1.k", "blk.1.v"]


def test_two_origins() -> None:
    """A wrong embedding row late in the prompt does not hide a fault in a later layer at earlier positions."""
    ref = random(positions=40)
    ours = spoiled(noisy(ref), DEFAULT, slice(30, None))
    ours = spoiled(ours, after("blk.10.l_out"), slice(0, 30))
    ours["embd"][31:] = ref["embd"][31:]
    verdict = compare(dump(ours), dump(ref))
    assert [(origin.first.checkpoint, origin.positions) for origin in verdict.origins] == [
        ("embd", (30,)),
        ("blk.10.l_out", tuple(range(30))),
    ]


def test_origins_are_the_minimal_failing_records() -> None:
    """On random failures the origins are what the definition says, read off record by record."""
    rng = np.random.default_rng(5)
    names = ("embd", "blk.0.q", "blk.0.k", "blk.0.v", "blk.0.kqv_out", "blk.0.l_out", "blk.1.q", "blk.1.l_out")
    branches = {"blk.0.q", "blk.0.k", "blk.0.v"}
    for _ in range(20):
        bad = {(int(p), int(t)) for p, t in zip(rng.integers(0, 8, 6), rng.integers(0, 10, 6), strict=True)}
        failed = np.zeros((len(names), 10), dtype=np.bool_)
        failed[tuple(zip(*bad, strict=True))] = True
        expected = {
            (p, t) for p, t in bad if not any(q < p and s <= t and not {names[p], names[q]} <= branches for q, s in bad)
        }
        point, position = np.repeat(np.arange(len(names)), 10), np.tile(np.arange(10), len(names))
        above = upstream(flow(names), point, 0 * point, position, failed.ravel().astype(float), failed.ravel())
        first = failed.ravel() & ~above.failed
        assert set(zip(point[first].tolist(), position[first].tolist(), strict=True)) == expected


def test_nan_on_one_side_always_fails() -> None:
    """NaN that spreads, and infinity beyond the slice, fail whatever the tolerance; on both sides alike NaN is no difference."""
    ref = random()
    inside, beyond = ({name: x.copy() for name, x in ref.items()} for _ in range(2))
    for name in ("blk.5.l_out", "blk.10.l_out", "blk.23.l_out", "output_norm", "logits"):
        inside[name][4, 3] = np.nan
    beyond["blk.5.l_out"][4, 40] = np.inf
    for ours in (inside, beyond):
        verdict = compare(dump(ours), dump(ref), Options(tolerance=1e9))
        assert verdict.first_divergence is not None
        assert verdict.first_divergence.nmse == np.inf
        assert verdict.pattern is not None
        assert verdict.pattern.code == "nonfinite"
    assert compare(dump(inside), dump(inside))


def test_a_fault_beyond_the_slice_is_seen() -> None:
    """One channel off, outside the leading values, fails by the sketch of the whole row."""
    ref = random()
    ours = {name: x.copy() for name, x in ref.items()}
    ours["blk.10.l_out"][:, 50] *= 1.15
    verdict = compare(dump(ours), dump(ref), Options(strict=True))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.nmse_slice == 0
    assert verdict.first_divergence.checkpoint == "blk.10.l_out"


def test_attention_to_later_positions_fails() -> None:
    """Weight on later positions is the causal mask's absence, however small the rest of the difference is."""
    rng = np.random.default_rng(0)
    scores = rng.random((2, 6, 6)).astype(np.float32)
    masked = scores * np.tri(6, dtype=np.float32)
    leaking = masked + np.float32(1e-4) * (1 - np.tri(6, dtype=np.float32))
    sides = [
        Dump("x", None, {"blk.0.kq_soft_max": summarise("blk.0.kq_soft_max", weights, np.arange(6))})
        for weights in (leaking, masked)
    ]
    verdict = compare(*sides)
    assert verdict.pattern is not None
    assert verdict.pattern.code == "causal-mask"
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.nmse == 0


def test_unknown_arithmetic_is_judged_by_the_jump() -> None:
    """An engine that does not say what it computes in may be as rough as bf16, but not jump far above its own noise."""
    ref = random()
    foreign = {"header": None}
    assert compare(dump(noisy(ref, 3e-3), **foreign), dump(ref))  # type: ignore[arg-type]
    jumping = spoiled(noisy(ref), after("blk.10.l_out"), slice(None), 1e-3)
    verdict = compare(dump(jumping, **foreign), dump(ref))  # type: ignore[arg-type]
    assert verdict.limits.assumed
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.10.l_out"
    assert not compare(dump(noisy(ref, 3e-3), **foreign), dump(ref), Options(compute="f32"))  # type: ignore[arg-type]


def test_missing_records_are_listed() -> None:
    """Records that one side lacks are listed; they are a divergence only with `strict`."""
    ref = random()
    ours = {name: x for name, x in ref.items() if name != "blk.10.l_out"}
    left = dump(ours)
    left.points["embd"] = left.points["embd"].take(np.arange(10))
    verdict = compare(left, dump(ref))
    assert verdict
    assert verdict.missing_ours.points == ("blk.10.l_out",)
    assert verdict.missing_ours.positions == (10, 11)
    assert verdict.missing_ours.records == 14
    strict = compare(left, dump(ref), Options(strict=True))
    assert not strict
    assert strict.first_divergence is None


def test_nothing_in_common_is_an_error() -> None:
    """Dumps without a common point or position are refused, never called parity."""
    ref = random()
    with pytest.raises(DumpError, match="no point in common"):
        compare(dump({"embd": ref["embd"]}), dump({"logits": ref["logits"]}))
    late = dump(ref)
    late.points.update({name: replace(rows, token_idx=rows.token_idx + 100) for name, rows in late.points.items()})
    with pytest.raises(DumpError, match=r"no position in common.*--offset -100"):
        compare(late, dump(ref))
    third = dump(ref)
    third.points.update({name: replace(rows, seq=rows.seq + 3) for name, rows in third.points.items()})
    with pytest.raises(DumpError, match=r'of sequence 3, the reference .*"seq" is 0'):
        compare(third, dump(ref))


def test_a_tolerance_is_the_limit_at_every_point() -> None:
    """Behind layers that agree as in float32, too: an entry of GELU's table that falls to the other side is far above their noise."""
    ref = random()
    ours = spoiled(noisy(ref), DEFAULT[3:], [3], 1e-4)
    assert compare(dump(ours), dump(ref), Options(tolerance=1e-5))
    assert not compare(dump(ours), dump(ref), Options(tolerance=1e-9))


def test_unusable_options_are_refused() -> None:
    """A tolerance that is not a number and an unknown arithmetic are errors of the request."""
    ref = dump(random())
    for options in (Options(tolerance=float("nan")), Options(tolerance=-1.0), Options(compute="f8")):
        with pytest.raises(InputError):
            compare(ref, ref, options)


def test_next_can_be_selected() -> None:
    """What the verdict asks to record is a `--points` value that names points of the model."""
    verdict = judged(slice(1, None))
    names = ["embd", *(f"blk.{i}.{kind.name}" for i in range(24) for kind in LAYER_KINDS), "output_norm", "logits"]
    chosen = select(verdict.next, names, 24)
    assert "blk.0.l_out" in chosen
    assert {"blk.1.attn_norm", "blk.3.q_rope", "blk.5.l_out"} <= set(chosen)


def test_an_encoder_has_no_causal_mask() -> None:
    """Right at position 0 and wrong from 1 on does not point to a mask, or to Q and K alone, if every position sees all others."""
    origins = {
        "enc.embd": Computation("GET_ROWS"),
        "enc.blk.0.kq": Computation("MUL_MAT", ("enc.embd", "enc.embd")),
        "enc.blk.0.kq_soft_max": Computation("SOFT_MAX", ("enc.blk.0.kq",)),
        "enc.blk.0.l_out": Computation("MUL_MAT", ("enc.embd", "enc.blk.0.kq_soft_max")),
        "logits": Computation("MUL_MAT", ("enc.blk.0.l_out",), ("output.weight",)),
    }
    header = replace(HEADER, dataflow=Dataflow(origins).to_json())
    ref = random(("enc.embd", "enc.blk.0.l_out", "logits"))
    for positions in (slice(1, None), slice(None), slice(0, -1)):
        answer = compare(dump(spoiled(noisy(ref), ("enc.blk.0.l_out", "logits"), positions)), dump(ref, header=header))
        assert answer.first_divergence is not None
        assert answer.first_divergence.checkpoint == "enc.blk.0.l_out"
        assert answer.pattern is not None
        assert "mask is missing" not in answer.pattern.sentence
        assert "causal" not in answer.pattern.sentence
        if positions.start == 1:
            assert "every position sees all others" in answer.pattern.sentence
