"""`parity explain` on a device: every fault acts there as it does on the host, and the same cause is named."""

from pathlib import Path

import numpy as np
import pytest
from planted import Faulty, Planted, tokens_of

from engine.backend import choose
from engine.faults import CATALOGUE, Planting
from engine.inapplicable import NotApplicable
from engine.replay.replay import Replay
from engine.synth import Shape, synthesize
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.explain.explain import ExplainOptions, explain

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cupy.cuda.is_available(), reason="no CUDA device")]

SHAPE = Shape("qwen2", 2, 112, 14, 2, 0, 128, 300)  # groups of 7 query heads, as Qwen2.5-0.5B
LIMIT = 1e-6  # NMSE: float32's 1e-12, but for faults that divide what is nearly 0 or overflow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    path = tmp_path_factory.mktemp("gpu") / "model.gguf"
    synthesize(path, SHAPE, weight_type="f16", seed=3)
    return path


def _logits(replay: Replay, transformer: Transformer, name: str) -> np.ndarray | None:
    """What the first variant of a fault makes of the logits; None where the model has no place for it."""
    planting = Planting(transformer.steps)
    fault = CATALOGUE[name]
    try:
        steps = planting.of(fault, None, (fault.variants(planting.right) or [{}])[0])
        changed = replay.run(steps, lambda _name, _value: True)
    except NotApplicable:
        return None
    last = [value for point, value in changed.items() if point.endswith(("logits", "l_out"))]
    return transformer.backend.to_host(last[-1]) if last else np.zeros(0)


@pytest.mark.parametrize("name", CATALOGUE)
def test_each_fault_acts_on_the_device_as_on_the_host(model: Path, name: str) -> None:
    """None is lost because an operation is not there for device arrays, and the numbers are the host's."""
    engines = []
    for backend in ("numpy", "cupy"):
        transformer = Transformer(GgufModel(model), choose(backend))
        tokens = tokens_of(model, 9, seed=4)
        passes = [0] * 6 + [1, 2, 3]
        replay = Replay(transformer.steps, tokens, range(9), passes, transformer.weights, transformer.backend)
        engines.append(_logits(replay, transformer, name))
    host, device = engines
    assert (host is None) == (device is None)
    if host is not None and device is not None:
        assert host.shape == device.shape
        finite = np.isfinite(host)
        np.testing.assert_array_equal(finite, np.isfinite(device))
        wide = host[finite].astype(np.float64)
        assert ((wide - device[finite]) ** 2).sum() <= LIMIT * (wide**2).sum()


@pytest.mark.parametrize("name", ["rope-pairs", "activation", "leading-dimension", "logits-last-only", "capture-row"])
def test_the_cause_is_named_on_the_device(model: Path, name: str) -> None:
    """The whole search runs on the device and ends with the cause that it names on the host."""
    faulty = Faulty(model)
    tokens = tokens_of(model, 12, seed=5)
    parameters = CATALOGUE[name].variants({step.makes: step for step in faulty.right})[0]
    dump = faulty.dump(Planted(((name, parameters, None),)), tokens)
    host, device = (explain(dump, model, ExplainOptions(tokens=tokens, backend=backend)) for backend in ("numpy", "cupy"))
    assert [cause.named for cause in device.causes] == [cause.named for cause in host.causes]
    assert device.remaining is None
