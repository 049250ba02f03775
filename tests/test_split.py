"""One model over several devices."""

from pathlib import Path

import numpy as np
import pytest

from checkpoints.errors import InputError
from engine.backend import Backend, choose
from engine.split import SplitTransformer
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.run.request import Request
from parity.run.session import run

PROMPT = (2047, 9, 8, 7, 300, 12)


def logits(engine: Transformer) -> list[np.ndarray]:
    """The logits of a prompt and of two tokens after it."""
    sequence = engine.start()
    return [engine.forward(tokens, sequence) for tokens in (PROMPT, (5,), (6,))]


@pytest.mark.parametrize("count", [1, 2, 3, 24, 30])
def test_cutting_a_model_changes_no_number(stories: Path, count: int) -> None:
    """Any number of consecutive parts computes what the whole does, to the bit, and each layer is in one part only."""
    model = GgufModel(stories)
    split = SplitTransformer(model, [choose("numpy")] * count)
    assert len(split.stages) == min(count, 24)
    assert [step for stage in split.stages for step in stage.steps] == list(split.steps)
    for ours, whole in zip(logits(split), logits(Transformer(model, choose("numpy"))), strict=True):
        np.testing.assert_array_equal(ours, whole)


def test_parts_hand_on_only_what_later_ones_read(stories: Path) -> None:
    """Between two devices go the residual stream and what the run was given, nothing else."""
    first, second = SplitTransformer(GgufModel(stories), [choose("numpy")] * 2).stages
    assert first.leaves == {"blk.11.l_out"}
    assert second.needs == {"blk.11.l_out", "positions"}


def test_devices_are_of_cuda() -> None:
    """A device's number with the NumPy backend is refused in one line."""
    with pytest.raises(InputError, match="--backend numpy has none"):
        choose("numpy", 0)


@pytest.fixture
def two_devices() -> list[Backend]:
    """Two CUDA devices, or a reason to skip."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available() or cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two CUDA devices")
    return [choose("cupy", 0), choose("cupy", 1)]


@pytest.mark.gpu
def test_two_devices_equal_one(stories: Path, two_devices: list[Backend]) -> None:
    """Layers on two devices give the logits of one device to the bit, and the weights lie where their layers do."""
    model = GgufModel(stories)
    split = SplitTransformer(model, two_devices)
    for ours, whole in zip(logits(split), logits(Transformer(model, two_devices[0])), strict=True):
        np.testing.assert_array_equal(ours, whole)
    for stage in split.stages:
        for name in ("attn_q", "ffn_down"):
            layer = next(step.makes.split(".")[1] for step in stage.steps if step.makes.startswith("blk."))
            assert stage.weights.get(f"blk.{layer}.{name}.weight").device.id == stage.backend.number


@pytest.mark.gpu
@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize(("devices", "message"), [((0, 1), "devices 0, 1"), ((1,), "device 1")])
def test_a_run_on_chosen_devices_is_in_parity(stories: Path, tmp_path: Path, devices: tuple[int, ...], message: str) -> None:
    """`parity run --devices 0,1` and `--devices 1`: every point agrees with llama.cpp within the exact limits."""
    outcome = run(Request(model=stories, tokens=PROMPT, devices=devices, points="all", generate=4, out=tmp_path))
    assert outcome.verdict, outcome.verdict.first_divergence
    assert outcome.ours.header is not None
    assert outcome.ours.header.build["device"].endswith(message)
