"""Ten faults planted in an engine whose whole values are judged: each is named at its operations and layers, and nothing else."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from checkpoints.isolation import PROVEN, WRONG, Isolation
from engine.backend import choose
from engine.faults import CATALOGUE, plant
from engine.gguf_model import GgufModel
from engine.graph import Step
from engine.transformer import Transformer
from parity.isolation import IsolateRequest, isolate
from parity.ours import OursJob, dump

TOKENS = (1, 403, 407, 261, 378, 390)  # any ids of the embedded model's vocabulary
LAYERS = (3, 7, 20)
# fault: the operations that it spoils
KINDS = {
    "rope-pairs": ("q_rope", "k_rope"),
    "rope-base": ("q_rope", "k_rope"),
    "no-qkv-bias": ("q", "k", "v"),
    "norm-epsilon": ("attn_norm", "ffn_norm", "output_norm"),
    "gqa-modulo": ("kq", "kqv_out"),
    "no-causal-mask": ("kq_soft_max",),
    "gate-up-swapped": ("ffn_gate", "ffn_up"),
    "transposed": ("attn_out",),
    "no-final-norm": ("output_norm",),
    "q4k-scale-min": ("q", "k", "v", "attn_out", "ffn_gate", "ffn_up", "ffn_out"),
}


class Foreign:
    """An engine whose steps can be spoiled, and the judgement of what it dumped."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        self.engine = Transformer(GgufModel(model), choose("numpy"))
        self.right = self.engine.steps
        self.out = folder / "foreign.jsonl"

    def judged(self, steps: Sequence[Step], **request: object) -> Isolation:
        self.engine.steps = steps
        try:
            dump(self.engine, OursJob(self.out, TOKENS, points="all", full=True))
        finally:
            self.engine.steps = self.right
        return isolate(IsolateRequest(self.model, dump=self.out, **request))  # type: ignore[arg-type]


def expected(foreign: Foreign, fault: str, layers: Sequence[int]) -> set[str]:
    """The points that the fault spoils in these layers."""
    tensors = foreign.engine.model.tensors
    names = {f"blk.{layer}.{kind}" for layer in layers for kind in KINDS[fault] if kind != "output_norm"}
    if fault == "q4k-scale-min":  # llama.cpp keeps some matrices of a Q4_K_M file in Q6_K
        weights = {step.makes: str(step.weights[0]) for step in foreign.right if step.makes in names}
        names = {name for name in names if tensors[weights[name]].type == 12}
    return names | ({"output_norm"} if "output_norm" in KINDS[fault] else set())


@pytest.mark.parametrize("fault", KINDS)
def test_a_fault_is_named_where_it_is_and_nowhere_else(fault: str, quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """Planted in three layers, exactly its own operations there are wrong, and all the other 450 are proven."""
    foreign = Foreign(quantized("Q4_K_M" if fault == "q4k-scale-min" else "Q8_0"), tmp_path)
    found = foreign.judged(plant(foreign.right, CATALOGUE[fault], LAYERS))
    wrong = expected(foreign, fault, LAYERS)
    assert wrong
    assert {item.name for item in found.operations if item.status == WRONG} == wrong
    assert {item.name for item in found.operations if item.status == PROVEN} == {step.makes for step in foreign.right} - wrong
    assert not found


def test_three_faults_at_once_are_all_named(stories: Path, tmp_path: Path) -> None:
    """Three different faults in different layers are three wrong places; behind the first nothing is blamed for it."""
    foreign = Foreign(stories, tmp_path)
    steps = plant(foreign.right, CATALOGUE["rope-base"], [2])
    steps = plant(steps, CATALOGUE["transposed"], [9])
    steps = plant(steps, CATALOGUE["gate-up-swapped"], [17])
    found = foreign.judged(steps)
    wrong = {"blk.2.q_rope", "blk.2.k_rope", "blk.9.attn_out", "blk.17.ffn_gate", "blk.17.ffn_up"}
    assert {item.name for item in found.wrong} == wrong
    assert sum(item.status == PROVEN for item in found.operations) == len(foreign.right) - len(wrong)
    reasons = {item.name: item.reason for item in found.wrong}
    assert "transposed" in reasons["blk.9.attn_out"]


def test_a_right_engine_is_proven_everywhere(stories: Path, tmp_path: Path) -> None:
    """Without a fault every operation of the same dump is proven, to 1e-11, and nothing is left unseen."""
    foreign = Foreign(stories, tmp_path)
    found = foreign.judged(foreign.right)
    assert found
    assert {item.status for item in found.operations} == {PROVEN}
    assert max(item.nmse or 0 for item in found.operations) < 1e-11
