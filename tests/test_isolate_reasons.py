"""What isolate says of a wrong operation beside its name: the epsilon, the weight or the positions with which it is right."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from isolated_engine import Foreign
from msgspec.structs import replace

from checkpoints.answers.isolate import NOT_OBSERVABLE, PROVEN, WRONG, Operation
from engine.faults import CATALOGUE, plant
from engine.graph import Altered, Step
from parity.isolate.judged_layers import LAYER, eliminated
from reference.client import Reference
from reports.isolation import lines


def test_an_epsilon_is_named_with_its_value(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """A norm with another epsilon is told as what it is."""
    foreign = Foreign(synthetic(layers=4), tmp_path)
    isolation = foreign.judged(plant(foreign.right, CATALOGUE["norm-epsilon"], [0], eps=1e-3))
    first = next(item for item in isolation.wrong if item.name == "blk.0.attn_norm")
    assert first.reason == "it is right with an epsilon of 0.001 instead of 1e-06"
    final = foreign.judged(plant(foreign.right, CATALOGUE["no-final-norm"]))
    assert [item.reason for item in final.wrong] == ["its output is its input: not normalised"]


def test_what_several_layers_show_is_said_once(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """Norms with another epsilon in three of four layers are one sentence with these layers; a norm of which something else is said is
    another one.
    """
    foreign = Foreign(synthetic(layers=4), tmp_path)
    others = plant(foreign.right, CATALOGUE["norm-epsilon"], [0, 1, 3], eps=1e-3, at=("attn_norm",))
    isolation = foreign.judged(plant(others, CATALOGUE["norm-epsilon"], [2], eps=1e-2, at=("attn_norm",)))
    text = "\n".join(line.plain for line in lines(isolation, 400))
    assert text.count("with an epsilon of") == 2
    assert "blk.N.attn_norm in layers 0–1, 3 (" in text
    assert "blk.2.attn_norm (" in text


def test_an_epsilon_of_layer_norms_is_named_with_its_value(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """A LayerNorm with another ε is told as that: its mean and its bias are taken off before ε is solved for."""
    foreign = Foreign(small_model("starcoder2", layers=2), tmp_path, reference)
    isolation = foreign.judged(plant(foreign.right, CATALOGUE["norm-epsilon"], [0], eps=1e-3))
    reasons = {item.name: item.reason for item in isolation.wrong}
    assert reasons == dict.fromkeys(
        ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"), "it is right with an epsilon of 0.001 instead of 1e-05"
    )


def test_what_an_operation_read_for_its_weight_is_named(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """Norms without their weight or bias, or with the weight of another norm or layer; a product with another layer's: six at once."""
    foreign = Foreign(small_model("starcoder2", layers=3), tmp_path, reference)
    faults: dict[str, tuple[int, str | Callable[[np.ndarray], np.ndarray], str]] = {
        "blk.0.attn_norm": (0, lambda weight: weight + np.float32(1), "it is right with 1 + blk.0.attn_norm.weight"),
        "blk.0.ffn_norm": (1, np.zeros_like, "it is right without blk.0.ffn_norm.bias"),
        "blk.1.attn_norm": (0, "blk.1.ffn_norm.weight", "it is right with blk.1.ffn_norm.weight"),
        "blk.1.ffn_norm": (0, np.ones_like, "it is right without blk.1.ffn_norm.weight"),
        "blk.2.attn_norm": (0, "blk.0.attn_norm.weight", "it is right with blk.0.attn_norm.weight"),
        "blk.2.v": (0, "blk.0.attn_v.weight", "it is the product with blk.0.attn_v.weight"),
    }

    def faulty(step: Step) -> Step:
        if step.makes not in faults:
            return step
        weights, (at, other, _) = list(step.weights), faults[step.makes]
        changed = other if isinstance(other, str) else Altered(str(weights[at]), lambda source, name: other(source.get(name)))
        return replace(step, weights=(*weights[:at], changed, *weights[at + 1 :]))

    isolation = foreign.judged([faulty(step) for step in foreign.right])
    assert {item.name: item.reason for item in isolation.wrong} == {name: reason for name, (*_, reason) in faults.items()}


def test_rows_of_other_positions_do_not_speak_of_the_weight(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """A product whose later rows are those of two positions before, or rows of nothing: its weight is right for the others."""
    foreign = Foreign(synthetic(layers=2), tmp_path)

    def ring(value: np.ndarray) -> np.ndarray:
        return np.concatenate([value[:4], value[2:4]])

    def spoiled(value: np.ndarray) -> np.ndarray:
        return np.concatenate([value[:4], -2 * value[4:]])

    changes = {"blk.0.ffn_up": ring, "blk.1.ffn_up": spoiled}

    def faulty(step: Step) -> Step:
        if (change := changes.get(step.makes)) is None:
            return step
        return replace(step, op=lambda *inputs, **given: change(step.op(*inputs, **given)))

    isolation = foreign.judged([faulty(step) for step in foreign.right])
    assert {item.name: item.reason for item in isolation.wrong} == {
        "blk.0.ffn_up": "2 of 6 positions; position t holds the right value of position t − 2",
        "blk.1.ffn_up": "2 of 6 positions; every element is -2 times the right one",
    }


@pytest.mark.parametrize(
    ("recorded", "chooses", "status"), [(True, True, NOT_OBSERVABLE), (False, True, WRONG), (True, False, WRONG)]
)
def test_a_layer_whose_rounding_may_choose_other_experts_is_not_wrong(recorded: bool, chooses: bool, status: str) -> None:
    """All is proven but a router's rounding, a thirtieth of the layer's error: an operation unseen, or no choice, blames it."""
    operations = [
        Operation("attn_norm", 0, PROVEN, 1e-14),
        Operation("ffn_moe_logits", 0, NOT_OBSERVABLE, 2e-5, reason="its error has the size of 8-bit arithmetic"),
    ]
    if chooses:
        operations.append(Operation("ffn_moe_topk", 0, PROVEN, 0.0))
    if not recorded:
        operations.append(Operation("kq", 0, NOT_OBSERVABLE, reason="no record of kq"))
    (layer,) = eliminated(operations, [Operation(LAYER, 0, WRONG, 6e-4, reason="llama.cpp's own layer gives another output")])
    assert layer.status == status
