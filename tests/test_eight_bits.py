"""`diff` without a model and without a declared arithmetic: noise of 8-bit activations is told from faults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from checkpoints.answers.diff import Verdict
from checkpoints.record import Dump
from checkpoints.summary import summarise
from engine.faults import CATALOGUE
from engine.graph import Step
from engine.replay.precision import multiplies, rounded
from parity.diff.compare import Options, compare
from parity.diff.verdict.scatter import one_is_scaled, share_along
from reports.sentences import answer

RIGHT = Planted(())


@pytest.fixture(scope="module")
def engine(synthetic: Callable[..., Path]) -> Faulty:
    """Six layers of random weights."""
    return Faulty(synthetic(layers=6, width=128, heads=4, kv_heads=2, ff=192))


def judged(engine: Faulty, planted: Planted = RIGHT, **asked: Any) -> Verdict:
    """The verdict on an engine that does not state its arithmetic, compared with the right one in float32."""
    tokens = tokens_of(engine.model, 7, seed=4)
    points, strict = asked.pop("points", "default"), asked.pop("strict", False)
    right = engine.dump(RIGHT, tokens, points=points, size=1 << 20, bare=False)
    return compare(_bare(engine.dump(planted, tokens, points=points, **asked)), right, Options(strict=strict))


def _bare(dump: Dump) -> Dump:
    assert dump.header is not None
    return replace(dump, header=replace(dump.header, compute="", mode="", source="an engine"))


@pytest.mark.parametrize("points", ["default", "all"])
@pytest.mark.parametrize("size", [10, 16, 1 << 20])
def test_undeclared_8_bit_activations_are_a_suspicion(engine: Faulty, points: str, size: int) -> None:
    """An engine that multiplies 8-bit activations and does not say so: no operation is blamed, and the answer says what settles it."""
    verdict = judged(engine, points=points, size=size, steps=rounded(engine.right, "q8", storage=False))
    if verdict:  # within what BF16 costs
        assert "assumed" in answer(verdict).partition(":")[0]
        return
    assert verdict.pattern is not None
    assert verdict.pattern.code == "eight-bits"
    assert "--compute q8" in verdict.pattern.sentence
    assert not verdict.operation


def test_noise_of_that_size_acquits_no_fault(engine: Faulty) -> None:
    """LayerNorm for RMSNorm can make noise as large as that of 8-bit activations: it stays a divergence."""
    assert not judged(engine, Planted((("layer-norm", {}, None),)))


def test_strict_assumes_nothing(engine: Faulty) -> None:
    """--strict judges the same dump by the looser types' limits only where the table has them."""
    answer = judged(engine, strict=True, steps=rounded(engine.right, "q8", storage=False))
    assert answer.limits.operations < 1e-3


@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("rope-pairs", {}, None),
        ("rope-pairs", {}, (3,)),
        ("attn-scale", {}, None),
        ("residual-missing", {"at": ("l_out",)}, (2,)),
        ("gqa-modulo", {}, None),
        ("norm-epsilon", {"eps": 1e-1, "at": ("attn_norm", "ffn_norm")}, None),
    ],
)
def test_faults_are_no_8_bit_arithmetic(
    engine: Faulty, name: str, parameters: dict[str, Any], layers: tuple[int, ...] | None
) -> None:
    """A fault that leaves a position or a layer right, or is far larger, or is another scale: a divergence, and no suspicion."""
    parameters = CATALOGUE[name].variants({step.makes: step for step in engine.right})[0] | parameters
    answer = judged(engine, Planted(((name, parameters, layers),)))
    assert not answer
    assert answer.pattern is None or answer.pattern.code != "eight-bits"


def test_one_large_position_says_nothing_of_noise() -> None:
    """Noise of one position lies along its large values by chance: all positions count alike. A factor lies along all of them."""
    rng = np.random.default_rng(7)
    values, noise = rng.standard_normal((2, 9, 10))
    values[2] *= 6
    noise[2] = 6 * (noise[2] / np.linalg.norm(noise[2]) + 0.8 * values[2] / np.linalg.norm(values[2]))
    assert share_along(noise, values) < 0.3
    assert share_along(values * rng.uniform(1e-3, 2e-3, (9, 1)), values) > 0.99
    assert share_along(np.zeros((9, 10)), values) == 0
    assert not one_is_scaled(noise, values)
    assert not one_is_scaled(values * rng.uniform(1e-3, 2e-3, (9, 1)), values)


@pytest.mark.parametrize(("sketched", "known"), [(True, True), (False, False)])
def test_whole_rows_tell_noise_where_a_few_recorded_values_do_not(engine: Faulty, *, sketched: bool, known: bool) -> None:
    """Of sixteen recorded values one is most of the row and of its noise, which so lies along it; the sketch shows that it is noise."""
    tokens = tokens_of(engine.model, 7, seed=4)
    right = engine.dump(RIGHT, tokens, points="default", size=1 << 20, bare=False)
    sides: list[Dump] = []
    for noise in (0.0, 0.03):
        points, random = dict(right.points), np.random.default_rng(3)
        for name in [name for name in points if name != "embd"]:
            values = points[name].values.copy()
            values[:, 0] = np.float32(7) * values.std(axis=1)
            values *= 1 + np.float32(noise) * random.standard_normal(values.shape, dtype=np.float32)
            points[name] = summarise(name, values, points[name].token_idx, slice_size=16)
            if not sketched:
                points[name] = replace(points[name], sketch=None, stats={})
        sides.append(replace(right, points=points))
    verdict = compare(_bare(sides[1]), sides[0])
    assert verdict.pattern is not None
    assert (verdict.pattern.code == "eight-bits") == known


def test_one_position_with_a_wrong_scale_is_no_8_bit_arithmetic(engine: Faulty) -> None:
    """An 8-bit engine that scales one position of seven wrongly at its first products: a divergence, and no suspicion of arithmetic."""
    steps = rounded(engine.right, "q8", storage=False)

    def one_scaled(*inputs: Any, op: Callable[..., Any], **params: Any) -> Any:
        out = op(*inputs, **params).copy()
        out[3] *= np.float32(1.05)
        return out

    steps = [
        replace(step, op=lambda *x, op=step.op, **p: one_scaled(*x, op=op, **p)) if step.makes == "blk.0.q" else step
        for step in steps
    ]
    for size in (16, 1 << 20):
        answer = judged(engine, points="all", size=size, steps=steps)
        assert not answer
        assert answer.pattern is None or answer.pattern.code != "eight-bits"


def test_noise_is_no_wrong_scale() -> None:
    """Of 500 draws of seven positions of normal noise, of ten to a thousand elements, none is called scaled."""
    rng = np.random.default_rng(1)
    for count in (10, 16, 1000):
        for _ in range(500 if count < 100 else 20):
            values, noise = rng.standard_normal((2, 7, count)) * np.exp(rng.standard_normal(count))
            assert not one_is_scaled(noise, values)


@pytest.mark.parametrize("point", ["blk.0.k", "blk.2.q"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_jump_in_a_lower_arithmetics_noise_is_no_8_bit_arithmetic(engine: Faulty, kind: str, point: str) -> None:
    """Queries or keys whose elements are in another order, in an engine that rounds and does not say so: the operation is named."""
    steps = [
        replace(step, op=lambda *x, op=step.op, **p: np.roll(op(*x, **p), 1, axis=-1)) if step.makes == point else step
        for step in rounded(engine.right, kind, storage=True)
    ]
    answer = judged(engine, points="all", size=1 << 20, steps=steps)
    assert answer.first_divergence is not None
    assert answer.first_divergence.checkpoint == point
    assert answer.operation.endswith("this operation is wrong")


def test_what_is_kept_in_f16_before_8_bit_products_is_no_measure_of_them(engine: Faulty) -> None:
    """Embeddings in F16 are a thousandth as far off as what activations of 6 bits make of them: that is no jump."""

    def in_f16(x: Any) -> Any:
        return x.astype(np.float16).astype(np.float32) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x

    def coarse(x: np.ndarray) -> np.ndarray:
        step = np.abs(x).max(axis=-1, keepdims=True) / 31
        return np.asarray(np.rint(x / step) * step, np.float32)

    def by(step: Step) -> Step:
        first = coarse if multiplies(step) else in_f16
        return replace(step, op=lambda x, *rest, op=step.op, **p: in_f16(op(first(x), *rest, **p)))

    for points in ("default", "all"):
        verdict = judged(engine, points=points, size=16, steps=[by(step) for step in engine.right])
        assert verdict.pattern is not None
        assert verdict.pattern.code == "eight-bits"
        assert not verdict.operation
