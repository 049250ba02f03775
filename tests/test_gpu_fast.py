"""The fast mode against the plain definition: weights to the bit, whole runs within the measured limits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sinks import Sink

from engine.backend import choose
from engine.capture.device import DeviceStage
from engine.capture.tap import Capture
from engine.fast.decode import DecodeStep
from engine.fast.transformer import FastTransformer
from engine.synth import shape_like, synthesize
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.diff.limits import fast_floor

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cupy.cuda.is_available(), reason="no CUDA device")]
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K_M", "Q6_K")


def nmse(ours: np.ndarray, theirs: np.ndarray) -> float:
    wide = theirs.astype(np.float64)
    return float(((ours - wide) ** 2).sum() / (wide**2).sum())


@pytest.mark.parametrize("kind", TYPES)
def test_packed_weights_are_the_dequantised_ones_to_the_bit(quantized: Callable[[str], Path], kind: str) -> None:
    """The first 64 rows of the embedding, read element by element from the packed planes, equal the plain dequantisation."""
    model = GgufModel(quantized(kind))
    engine = FastTransformer(model, choose("cupy"), positions=128)
    captured = {}
    engine.forward(list(range(64)), engine.start(), lambda_tap(captured, "embd"))
    np.testing.assert_array_equal(
        captured["embd"].view(np.uint32), model.load_rows("token_embd.weight", np.arange(64)).view(np.uint32)
    )


def lambda_tap(captured: dict[str, np.ndarray], wanted: str):
    """A tap that keeps one value."""

    class Keep:
        def begin(self, now: object) -> None:
            """Nothing to prepare."""

        def __call__(self, name: str, value: object) -> None:
            if name == wanted:
                captured[name] = cupy.asnumpy(value)

    return Keep()


@pytest.mark.parametrize("kind", TYPES)
def test_a_run_is_within_the_measured_limits_of_exact_mode(quantized: Callable[[str], Path], kind: str) -> None:
    """Logits of a prompt and of 70 decode steps agree with the plain engine on the same device."""
    model, backend = GgufModel(quantized(kind)), choose("cupy")
    plain, fast = Transformer(model, backend), FastTransformer(model, backend, positions=128)
    left, other = plain.start(), fast.start()
    expected, computed = plain.forward([2047, 9, 8, 7, 300], left), fast.forward([2047, 9, 8, 7, 300], other)
    limit = fast_floor(model.hyperparameters.file_type)
    assert nmse(computed, expected) < limit.logits
    for _ in range(70):
        token = int(expected.argmax())
        expected, computed = plain.forward([token], left), fast.forward([token], other)
        assert nmse(computed, expected) < limit.logits


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q5_0"])
@pytest.mark.parametrize("near", [True, False], ids=["near", "far"])
@pytest.mark.parametrize("like", ["tiny", "tiny-llama"])
def test_decode_alone_rounds_little_but_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, like: str, near: bool, kind: str
) -> None:
    """The one-kernel step agrees with the plain engine to 1e-10, for both pairings of RoPE, also where it multiplies integers.

    Also where a layer's feed-forward does not fit into shared memory.
    """
    if not near:
        monkeypatch.setattr(DecodeStep, "_staging", lambda _self: {"GATE_BYTES": 0, "DOWN_BYTES": 0})
    path = tmp_path / "model.gguf"
    synthesize(path, shape_like(like), weight_type=kind)
    backend = choose("cupy")
    plain, fast = Transformer(GgufModel(path), backend), FastTransformer(GgufModel(path), backend, positions=256)
    left, other = plain.start(), fast.start()
    for token in range(200):  # one by one: a prefill rounds to half precision; from position 180 on a head is split
        assert nmse(fast.forward([token], other), plain.forward([token], left)) < 1e-10


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M", "Q6_K"])
def test_decode_of_quantised_types_rounds_little_but_sums(quantized: Callable[[str], Path], kind: str) -> None:
    """The same to 1e-10 with blocks of 256 elements, minima, and types that differ by layer."""
    model, backend = GgufModel(quantized(kind)), choose("cupy")
    plain, fast = Transformer(model, backend), FastTransformer(model, backend, positions=128)
    left, other = plain.start(), fast.start()
    for token in range(300, 320):
        assert nmse(fast.forward([token], other), plain.forward([token], left)) < 1e-10


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("f32", {}), ("f16", {}), ("q8_0", {}),
        ("f16", {"ff": 4096}), ("bf16", {"ff": 4096, "width": 320}),  # these rows come by way of shared memory, which is large enough
        ("f16", {"ff": 4096, "vocab": 151_934}),  # not by fours: by registers
    ],
)  # fmt: skip
def test_every_logit_of_a_large_vocabulary_is_right(tmp_path: Path, kind: str, shape: dict[str, int]) -> None:
    """Each 64 of 151,936 logits are the final norm's products in float64, the recorded ones too; the largest is chosen."""
    path = tmp_path / "model.gguf"
    synthesize(path, shape_like("tiny", **{"vocab": 151_936, **shape}), weight_type=kind)
    model = GgufModel(path)
    engine = FastTransformer(model, choose("cupy"), positions=128)
    sequence, sink, tokens = engine.start(), Sink(), (engine.hp.n_vocab - 1, 0, 75_000)
    kept = []
    with Capture(DeviceStage(sink, ["logits"], engine.backend)) as tap:
        for token in tokens:
            kept.append(engine.forward([token], sequence, tap))
            logits = kept[-1].astype(np.float64)
            output = "output.weight" if "output.weight" in model.tensors else "token_embd.weight"
            right = model.load(output).astype(np.float64) @ cupy.asnumpy(engine.step.output_norm).astype(np.float64)
            blocks = range(0, len(right), 64)
            errors, sizes = (np.add.reduceat(values, blocks) for values in ((logits - right) ** 2, right**2))
            assert (errors / sizes).max() < 1e-11
            chosen = engine.step.chosen(sequence.length, sequence.length + 1)
            assert int(chosen[0]) == int(logits.argmax())
    lowest, highest, sums = (np.concatenate([rows.stats[name] for rows in sink.taken]) for name in ("min", "max", "sum"))
    together = np.stack(kept)
    np.testing.assert_array_equal(lowest, together.min(axis=1))
    np.testing.assert_array_equal(highest, together.max(axis=1))
    np.testing.assert_allclose(sums, together.sum(axis=1, dtype=np.float64), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_value_that_is_not_finite_reaches_the_logits(tmp_path: Path, kind: str, odd: float) -> None:
    """A final norm's weight that is not finite makes the logits not finite, as in the plain engine: integers do not hide it."""
    path = tmp_path / "model.gguf"
    synthesize(path, shape_like("tiny"), weight_type=kind)
    engine = FastTransformer(GgufModel(path), choose("cupy"), positions=128)
    engine._weights.norm[5] = odd
    cupy.cuda.Device().synchronize()
    logits = engine.forward([7], engine.start())
    assert not np.isfinite(logits).any()
