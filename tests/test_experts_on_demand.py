"""Of a layer's experts only the chosen ones are dequantised."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints.graph import RecordedGraph
from engine.backend import choose
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from engine.weights.matrices import Matrices
from reference.client import Reference

EXPERTS, USED, LAYERS = 32, 2, 2
SETTINGS = {"expert_count": EXPERTS, "expert_used_count": USED}
Pair = tuple[Path, RecordedGraph]


@pytest.fixture(scope="module")
def moe(small_model: Callable[..., Path]) -> Pair:
    """A model of many experts, and its graph."""
    path = small_model("qwen3moe", "q8_0", settings=SETTINGS, layers=LAYERS)
    with Reference() as reference:
        return path, reference.graph(path)


def asked_of(moe: Pair, *, resident: bool, passes: int = 1) -> list[tuple[str, int]]:
    """The matrices that passes over one token dequantise."""
    asked: list[tuple[str, int]] = []

    class Counted(GgufModel):
        def load_matrix(self, name: str, number: int) -> np.ndarray:
            asked.append((name, number))
            return super().load_matrix(name, number)

        def load(self, name: str) -> np.ndarray:
            assert "_exps" not in name
            return super().load(name)

    engine = Transformer(Counted(moe[0]), choose("numpy"), resident=resident, recorded=moe[1])
    for _ in range(passes):
        engine.forward((7,), engine.start())
    return asked


def test_a_pass_over_one_token_dequantises_the_chosen_experts(moe: Pair) -> None:
    """Gate, up and down of each chosen expert of each layer, once, and no tensor of all experts."""
    asked = asked_of(moe, resident=False)
    assert len(asked) == len(set(asked)) == 3 * USED * LAYERS


def test_a_resident_model_keeps_them(moe: Pair) -> None:
    """A second pass over the same token dequantises nothing again; without residence it does."""
    assert len(asked_of(moe, resident=True, passes=2)) == 3 * USED * LAYERS
    assert len(asked_of(moe, resident=False, passes=2)) == 6 * USED * LAYERS


def test_a_matrix_is_that_part_of_the_whole_tensor(moe: Pair) -> None:
    """Each matrix by itself has the values that it has in the whole tensor; other leading dimensions count the same matrices."""
    model = GgufModel(moe[0])
    name = next(name for name in model.tensors if "ffn_down_exps" in name)
    whole = model.load(name)
    matrices = Matrices(lambda number: model.load_matrix(name, number), whole.shape).reshape((1, *whole.shape))
    for expert in (0, 1, EXPERTS - 1):
        np.testing.assert_array_equal(matrices[0, expert], whole[expert])
    with pytest.raises(ValueError, match="cannot be regarded as"):
        matrices.reshape((EXPERTS, whole.shape[2], whole.shape[1] + 1))
