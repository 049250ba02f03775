"""The limits of a conversion's rounding, row by row, on a trained model's rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.weights.gguf_model import GgufModel
from parity.weights.row_distance import Distance, Limit, limit_of
from reference.client import Reference

TYPES = ["F16", "BF16", "Q4_0", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K"))]


@pytest.fixture(scope="module")
def rounded(
    stories: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[GgufModel, GgufModel]]:
    """The embedded model as F32, and the same in another type."""
    folder = tmp_path_factory.mktemp("rounded")
    wide = reference.quantize(stories, "F32", folder / "wide.gguf")

    def make(kind: str) -> tuple[GgufModel, GgufModel]:
        return GgufModel(wide), GgufModel(reference.quantize(wide, kind, folder / f"{kind}.gguf"))

    return make


def distance_of(held: np.ndarray, wanted: np.ndarray) -> Distance:
    distance = Distance.of(len(held), held.shape[1])
    distance.put(0, held, wanted)
    return distance


@pytest.mark.parametrize("kind", TYPES)
def test_a_trained_models_rows_are_within_what_a_type_rounds(
    kind: str, rounded: Callable[[str], tuple[GgufModel, GgufModel]]
) -> None:
    """Each row of each matrix; and one row that is its neighbour's is seen in a matrix of any type."""
    wide, narrow = rounded(kind)
    for name, info in narrow.tensors.items():
        held, wanted = narrow.load(name), wide.load(name)
        held, wanted = held.reshape(-1, held.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
        limit = limit_of(info.type)
        assert limit.holds(distance_of(held, wanted)), name
        if len(held) < 8:
            continue
        lost = held.copy()
        lost[5] = held[6]
        wrong = distance_of(lost, wanted)
        assert list(limit.wrong_rows(wrong)) == [5], name
        assert limit.excess(wrong, "it is another row").startswith(f"row 5 of {len(held):,}: it is another row")


def test_rows_that_all_but_vanish_are_not_wrong() -> None:
    """Rows a millionth as large as others, which a scale in float16 makes zero, and a matrix of zeros: no fault."""
    random = np.random.default_rng(1)
    wanted = random.normal(0, 0.02, (64, 64)).astype(np.float32)
    wanted[3] *= 1e-6
    held = wanted.copy()
    held[3] = 0
    assert limit_of(8).holds(distance_of(held, wanted))
    assert limit_of(1).holds(distance_of(held, wanted))
    assert not limit_of(0).holds(distance_of(held, wanted))
    assert limit_of(0).holds(distance_of(np.zeros_like(held), np.zeros_like(held)))


def test_a_faint_row_is_judged_as_a_thousandth_of_the_mean() -> None:
    """A row of a fiftieth of the others' size may be off by what a row of a thousandth of the mean square may, and by no more."""
    energies = np.full(64, 1.0)
    energies[3] = 4e-4
    limit = Limit(whole=1e-3, row=1e-2, element=0.0)
    for share, wrong in ((0.9, []), (1.1, [3])):
        distance = Distance.of(64, 8)
        distance.energies[:] = energies
        distance.errors[3] = share * limit.row * 1e-3 * energies.mean()
        assert list(limit.wrong_rows(distance)) == wrong
