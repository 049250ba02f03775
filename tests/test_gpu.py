"""The engine on a device: the same numbers as on the host, and dequantisers equal to gguf-py to the bit."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from sinks import Sink
from test_run import SHAPES

from checkpoints.points import parse
from checkpoints.record import Rows
from engine.backend import choose
from engine.capture.device import DeviceStage
from engine.capture.host import HostStage
from engine.capture.tap import Capture, CapturedPass
from engine.fast.transformer import FastTransformer
from engine.transformer import Transformer
from engine.weights.dequantize import FORMATS, dequantize
from engine.weights.gguf_model import GgufModel
from parity.run.request import Request
from parity.run.session import run

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cupy.cuda.is_available(), reason="no CUDA device")]

PROMPT = (2047, 9, 8, 7, 300, 12, 13, 14)
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K_M", "Q6_K")


@pytest.mark.parametrize("kind", sorted(FORMATS), ids=lambda kind: gguf.GGMLQuantizationType(kind).name)
def test_device_dequantisers_equal_gguf_py(kind: int) -> None:
    """Random blocks dequantised on the device give the same float32 bits as gguf-py on the host."""
    from test_dequantize import random_blocks

    blocks = random_blocks(kind)
    ours = cupy.asnumpy(dequantize(cupy.asarray(blocks), kind, FORMATS[kind][0]))
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(ours.view(np.uint32).ravel(), np.ascontiguousarray(theirs).view(np.uint32).ravel())


@pytest.mark.parametrize("kind", TYPES)
def test_exact_mode_on_the_device_is_in_parity(quantized: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """Every point of a run on the device, prompt and generated tokens, agrees with llama.cpp within the exact limits."""
    outcome = run(
        Request(
            model=quantized(kind),
            tokens=PROMPT,
            backend="cupy",
            points="all",
            generate=4,
            out=tmp_path,
        )
    )
    assert outcome.verdict, outcome.verdict.first_divergence


@pytest.mark.parametrize(("like", "shape"), SHAPES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_every_shape_is_exact_on_the_device(synthetic: Callable[..., Path], tmp_path: Path, like: str, shape: dict) -> None:
    """Both architectures in every grouping, with and without biases and factors: all points of 33 tokens agree."""
    tokens = tuple(17 * i % 2000 for i in range(33))
    outcome = run(Request(model=synthetic(like, **shape), tokens=tokens, backend="cupy", points="all", out=tmp_path))
    assert outcome.verdict, outcome.verdict.first_divergence


def test_records_equal_a_blocking_copy(stories: Path) -> None:
    """Every record of every point equals, values to the bit, sketch and statistics to rounding, that of a blocking copy."""
    engine = Transformer(GgufModel(stories), choose("cupy"))
    pinned, blocking = Sink(), Sink()
    for stage, sink in ((DeviceStage, pinned), (HostStage, blocking)):
        with Capture(stage(sink, engine.points, engine.backend)) as tap:
            sequence = engine.start()
            engine.forward(PROMPT, sequence, tap)
            for token in (5, 6, 7):
                engine.forward([token], sequence, tap)
    compare_rows(pinned.taken, blocking.taken)


def test_records_of_a_fast_step_equal_a_blocking_copy(stories: Path) -> None:
    """Every record that a decode step makes while it runs equals one made of the values that it leaves in memory."""
    engine = FastTransformer(GgufModel(stories), choose("cupy"), positions=128)
    names = [name for name in engine.points if not name.endswith("kq_soft_max")]  # which lies nowhere: it is made of kq
    staged, blocking = Sink(), Sink()
    sequence = engine.start()
    engine.forward(PROMPT, sequence)
    with Capture(DeviceStage(staged, names, engine.backend)) as tap:
        for token in (5, 6, 7):
            engine.forward([token], sequence, tap)
    seen = sequence.length
    with Capture(HostStage(blocking, names, engine.backend)) as tap:
        tap.begin(CapturedPass(np.array([seen - 1]), seen - len(PROMPT), decode=True))
        for name in names:
            tap(name, left_by(engine, name, seen))
    compare_rows(staged.taken[-len(names) :], blocking.taken)


def left_by(engine: FastTransformer, name: str, seen: int) -> np.ndarray:
    """A point's value in the shape of the exact mode's, from the memory of the last decode step."""
    point, step, hp = parse(name), engine.step, engine.hp
    if point.layer is None:
        return {"embd": step.embd, "output_norm": step.output_norm, "logits": step.logits}[name][None]
    values = step.values[point.layer]
    if point.kind == "kq":
        return values["kq"].reshape(hp.n_heads, 1, -1)[:, :, :seen]
    if point.kind in ("k_read", "v_read"):
        return values[point.kind].reshape(-1, hp.n_kv_heads * hp.head_size)[:seen]
    if point.kind == "k_rope":
        return values["k_read"].reshape(-1, hp.n_kv_heads * hp.head_size)[seen - 1 : seen]
    return values[point.kind][None]


def compare_rows(ours: list[Rows], theirs: list[Rows]) -> None:
    """Record by record: values to the bit; sums to float64's, sketches to float32's rounding of the row's length."""
    assert [rows.point for rows in ours] == [rows.point for rows in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shapes == b.shapes, a.point
        for name in ("seq", "token_idx", "step", "decode", "counts"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=f"{a.point} {name}")
        np.testing.assert_array_equal(a.values.view(np.uint32), b.values.view(np.uint32), err_msg=a.point)
        assert a.stats.keys() == b.stats.keys(), a.point
        for name in ("n", "min", "max", "nonfinite", "absmax_at"):
            np.testing.assert_array_equal(a.stats[name], b.stats[name], err_msg=f"{a.point} {name}")
        size = b.stats["l2"][:, None] * 1e-6 + 1e-30
        assert a.sketch is not None
        assert b.sketch is not None
        assert (np.abs(a.sketch - b.sketch) <= size).all(), a.point
        np.testing.assert_allclose(a.stats["l2"], b.stats["l2"], rtol=1e-12)
        assert (np.abs(a.stats["sum"] - b.stats["sum"]) <= 1e-9 * (1 + b.stats["l2"])).all(), a.point


def test_a_model_larger_than_device_memory_is_streamed(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the whole model does not fit, weights are streamed by themselves, with the same logits to the bit."""
    from engine.backend import Backend

    whole = Transformer(GgufModel(stories), choose("cupy"))
    expected = whole.forward(PROMPT, whole.start())
    monkeypatch.setattr(Backend, "free_bytes", lambda _self: 20 << 20)
    streamed = Transformer(GgufModel(stories), choose("cupy"))
    assert not streamed.weights.resident
    np.testing.assert_array_equal(streamed.forward(PROMPT, streamed.start()), expected)


def test_rounding_to_tf32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUPY_TF32=1 in the environment the device is refused by name instead of computing in 10 bits."""
    from checkpoints.errors import InputError

    monkeypatch.setenv("CUPY_TF32", "1")
    with pytest.raises(InputError, match="CUPY_TF32 is set"):
        choose("cupy")


@pytest.mark.parametrize(("kind", "points"), [("F16", "all"), ("Q8_0", "all"), ("Q4_K_M", "default")])
def test_native_mode_on_the_device_is_the_fast_mode(
    quantized: Callable[[str], Path], tmp_path: Path, kind: str, points: str
) -> None:
    """`--mode native` runs the file's own types on the device, says the prefill's arithmetic, and agrees within native limits."""
    outcome = run(
        Request(model=quantized(kind), tokens=PROMPT, backend="cupy", mode="native", points=points, generate=4, out=tmp_path)
    )
    assert outcome.verdict, outcome.verdict.first_divergence
    assert outcome.ours.header is not None
    assert outcome.ours.header.compute == "f16"


def test_too_little_memory_is_one_clear_error(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that does not even hold the largest weight is refused with the needed and the free size."""
    from checkpoints.errors import InputError
    from engine.backend import Backend

    monkeypatch.setattr(Backend, "free_bytes", lambda _self: 1 << 20)
    with pytest.raises(InputError, match=r"needs 0\.\d\d GiB of device memory, 0\.00 GiB are free"):
        Transformer(GgufModel(stories), choose("cupy"))
