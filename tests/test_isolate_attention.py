"""`isolate` on what engines have: bare whole rows, no scores, and arithmetic that nobody declared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from checkpoints.answers.isolate import NOT_OBSERVABLE, PROVEN, WRONG, Isolation, Operation
from checkpoints.record import Dump
from engine import ops
from engine.backend import Array
from engine.faults import CATALOGUE
from engine.graph import Step
from engine.replay.precision import rounded
from parity.isolate.isolate import IsolateRequest, isolate
from parity.isolate.judged_layers import LAYER, eliminated
from parity.isolate.suspicions import as_eight_bits
from reference.client import Reference

# What an engine keeps of a layer anyway: no scores, no soft max, nothing of the cache.
KINDS = (
    "embd", "attn_norm", "q", "k", "v", "q_norm", "k_norm", "q_rope", "k_rope", "Qcur_normed", "Kcur_normed", "Vcur_normed", "kv",
    "kv_cmpr", "k_pe", "q_pe", "kqv_out", "attn_out", "ffn_inp", "l_out",
)  # fmt: skip
# Grouped heads; windows; sinks; soft caps; MLA with absorbed and with plain heads; a norm after RoPE.
RECIPES = ("qwen3", "gemma3", "gpt-oss", "gemma2", "deepseek2", "minicpm3", "llama4")

RIGHT = Planted(())


@pytest.fixture(scope="module")
def faulty(reference: Reference, small_model: Callable[..., Path]) -> Callable[[str], Faulty]:
    """The engine of a recipe's model in float32 weights, lifted from llama.cpp's graph."""
    engines: dict[str, Faulty] = {}

    def of(name: str) -> Faulty:
        if name not in engines:
            model = small_model(name, kind="f32")
            engines[name] = Faulty(model, reference.graph(model))
        return engines[name]

    return of


def in_another_order(steps: list[Step]) -> list[Step]:
    """The steps with products that are summed backwards."""

    def product(x: Array, weight: Array, bias: Array | None = None) -> Array:
        product = np.einsum("ti,oi->to", x[:, ::-1], weight[:, ::-1], optimize=False)
        return product if bias is None else product + bias

    return [replace(step, op=product) if step.op is ops.linear else step for step in steps]


def bare(dump: Dump, path: Path, kinds: tuple[str, ...] = KINDS) -> Path:
    """The records of some points as bare lines: no header, no shapes."""
    with path.open("w") as out:
        for name, rows in dump.points.items():
            for at in range(len(rows) if name.rpartition(".")[2] in kinds else 0):
                values = rows.values[at, : rows.counts[at]].tolist()
                out.write(json.dumps({"checkpoint": name, "token_idx": int(rows.token_idx[at]), "values": values}) + "\n")
    return path


def judged(engine: Faulty, reference: Reference, folder: Path, planted: Planted = RIGHT, **asked: Any) -> Isolation:
    """What is said of the bare lines of an engine."""
    tokens = tokens_of(engine.model, 9, seed=1)
    steps = asked.pop("steps", None)
    dump = engine.dump(planted, tokens, points="all", size=1 << 20, steps=steps)
    path = bare(dump, folder / "ours.jsonl", asked.pop("kinds", KINDS))
    return isolate(IsolateRequest(engine.model, tokens=tokens, dump=path, **asked), reference)


def mixes(isolation: Isolation) -> set[str]:
    """What became of attention's results."""
    return {operation.status for operation in isolation.operations if operation.operation == "kqv_out"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_attention_is_judged_from_queries_keys_and_values(
    recipe: str, faulty: Callable[[str], Faulty], reference: Reference, tmp_path: Path
) -> None:
    """Without scores in the dump: proven of a right engine, wrong of one that scales them otherwise, in every layer."""
    engine = faulty(recipe)
    right = judged(engine, reference, tmp_path, steps=in_another_order(engine.right), compute="f32")
    assert right
    assert mixes(right) == {PROVEN}
    worst = max(operation.nmse or 0.0 for operation in right.operations if operation.operation == "kqv_out")
    assert worst < 1e-13
    scaled = ("attn-scale", {}, None)
    variants = CATALOGUE["attn-scale"].variants({step.makes: step for step in engine.right})
    if not variants or recipe in ("gemma2", "gemma3"):  # their scale is one of the queries
        scaled = ("gqa-modulo", {"at": ("kq", "kqv_out")}, None)
        variants = CATALOGUE["gqa-modulo"].variants({step.makes: step for step in engine.right})
    wrong = judged(engine, reference, tmp_path, Planted(((scaled[0], variants[0], None),)), compute="f32")
    blamed = [operation for operation in wrong.wrong if operation.operation != LAYER]
    assert {operation.operation for operation in blamed} == {"kqv_out"}
    assert all(
        "an unrecorded one before it: " in operation.reason and "kq_soft_max" in operation.reason for operation in blamed
    )


@pytest.mark.slow
def test_undeclared_8_bit_products_are_no_fault(faulty: Callable[[str], Faulty], reference: Reference, tmp_path: Path) -> None:
    """An engine that rounds activations to 8 bits, and does not say so, or does: nothing is wrong, whole layers included."""
    engine = faulty("qwen3")
    steps = rounded(engine.right, "q8", storage=False)
    isolation = judged(engine, reference, tmp_path, steps=steps)
    assert isolation
    assert any(item.operation == LAYER and "8-bit activations" in item.reason for item in isolation.operations)
    assert judged(engine, reference, tmp_path, steps=steps, compute="q8")


def test_noise_of_every_product_is_a_suspicion() -> None:
    """Products that are all off by what 8 bits cost are not blamed; a product that is exactly right, or a wrong norm, speaks against it."""

    def operation(kind: str, nmse: float, weight: str = "Q8_0") -> Operation:
        status = WRONG if nmse > 3e-4 else PROVEN
        return Operation(kind, 0, status, nmse, weight=weight, sampled=1e-3 if weight else None)

    products = [operation(kind, nmse) for kind, nmse in (("q", 4e-4), ("k", 2e-4), ("ffn_out", 9e-4), ("attn_out", 3e-5))]
    operations = as_eight_bits([*products, operation("l_out", 1e-15, "")])
    assert [item.status for item in operations] == [NOT_OBSERVABLE, PROVEN, NOT_OBSERVABLE, PROVEN, PROVEN]
    assert "--compute q8" in operations[0].reason
    for other in (operation("ffn_up", 1e-14), operation("ffn_gate", 2e-2)):
        assert WRONG in {item.status for item in as_eight_bits([*products, other])}
    norm = replace(operation("attn_norm", 5e-4, ""), status=WRONG)
    assert WRONG in {item.status for item in as_eight_bits([*products, norm])}


def test_a_wrong_product_among_right_ones_is_no_8_bit_arithmetic(
    faulty: Callable[[str], Faulty], reference: Reference, tmp_path: Path
) -> None:
    """One layer's attn_out that is off by as much as 8-bit activations cost, where all others are right: it is wrong."""
    engine = faulty("qwen3")
    steps = list(engine.right)
    at = next(number for number, step in enumerate(steps) if step.makes == "blk.2.attn_out")
    steps[at] = rounded([steps[at]], "q8", storage=False)[0]
    isolation = judged(engine, reference, tmp_path, steps=steps, compute="f32")
    assert [item.name for item in isolation.wrong if item.operation != LAYER] == ["blk.2.attn_out"]


def test_what_is_left_of_a_wrong_layer_is_named(faulty: Callable[[str], Faulty], reference: Reference, tmp_path: Path) -> None:
    """Values were not recorded, every other operation of the layer is right and llama.cpp's own layer gives something else."""
    engine = faulty("qwen3")
    kinds = ("embd", "attn_norm", "q", "k", "q_norm", "k_norm", "q_rope", "k_rope", "l_out")
    variants = CATALOGUE["attn-scale"].variants({step.makes: step for step in engine.right})
    isolation = judged(engine, reference, tmp_path, Planted((("attn-scale", variants[0], None),)), compute="f32", kinds=kinds)
    layers = [item for item in isolation.wrong if item.operation == LAYER]
    assert layers
    assert all("so it is one of " in item.reason and "kqv_out, attn_out" in item.reason for item in layers), layers


def test_elimination_names_attention() -> None:
    """Where only attention's inside is not observable the layer's fault is attention; a wrong operation leaves nothing to eliminate."""

    def operation(kind: str, status: str) -> Operation:
        return Operation(kind, 3, status, nmse=None if status == NOT_OBSERVABLE else 1e-13)

    inside = [
        operation("q_rope", PROVEN),
        *(operation(kind, NOT_OBSERVABLE) for kind in ("kq", "kq_soft_max", "kqv_out")),
        operation("l_out", PROVEN),
    ]
    layer = Operation(LAYER, 3, WRONG, 1e-3, reason="something else")
    assert eliminated(inside, [layer])[0].reason.endswith(
        "every operation of it that could be judged is right: so it is attention"
    )
    assert eliminated([*inside, operation("ffn_out", WRONG)], [layer])[0].reason == "something else"
    assert eliminated(inside, [replace(layer, status=PROVEN)])[0].reason == "something else"


@pytest.mark.slow
def test_scores_made_of_unrecorded_ones_have_no_later_positions(
    faulty: Callable[[str], Faulty], reference: Reference, tmp_path: Path
) -> None:
    """gemma2's soft cap is made of scores that were not recorded, whose later positions no dump has: a right one is not wrong there, one
    1.001 times too large is.
    """
    engine = faulty("gemma2")
    kinds = (*KINDS, "scale", "k_read", "v_read", "kq_scaled_1", "kq_tanh", "kq_scaled_2", "kq_soft_max")
    assert not judged(engine, reference, tmp_path, kinds=kinds).wrong
    steps = [
        replace(step, op=lambda *x, op=step.op, **params: op(*x, **params) * np.float32(1.001))
        if step.makes == "blk.1.kq_scaled_1"
        else step
        for step in engine.right
    ]
    assert [item.name for item in judged(engine, reference, tmp_path, steps=steps, kinds=kinds).wrong] == ["blk.1.kq_scaled_1"]
