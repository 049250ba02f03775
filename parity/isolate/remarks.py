"""What an answer says of its run besides the operations: the model, metadata that are not computed with, what was not checked."""

from collections.abc import Iterator, Sequence
from functools import partial

from checkpoints.answers.isolate import NOT_OBSERVABLE, Operation
from checkpoints.points import parse
from engine.transformer import Transformer
from reference.client import Reference
from reference.jobs import NATIVE
from reports.numbers import count

from ..run.graphs import not_as_the_file_says
from .operation import Isolator


def named(transformer: Transformer) -> str:
    """The model in a line: its name, architecture, layers and type."""
    hp = transformer.hp
    return f"{hp.name or transformer.model.path.stem} · {hp.architecture}, {hp.n_layers} layers · {hp.file_type}"


def ignored(transformer: Transformer, reference: Reference) -> str:
    """What the metadata say and llama.cpp computes otherwise; empty if nothing."""
    return "; ".join(not_as_the_file_says(transformer, partial(reference.graph, transformer.model.path, NATIVE)))


def not_checked(operations: Sequence[Operation], passes: int, kv_type: str, *, foreign: bool = False) -> Iterator[str]:
    """Sentences on what this run does not check."""
    hidden = [operation for operation in operations if operation.status == NOT_OBSERVABLE]
    if hidden:
        yield f"{count(len(hidden), 'operation')} not observable"
    if passes == 1:
        yield "decode steps" + ("" if foreign else " (--generate 4 adds them)")
    yield "the tokenizer (parity tokens)" + (
        ", and weights as your engine loaded them (parity weights --theirs)" if foreign else ""
    )
    if not foreign and kv_type == "f32":
        yield "a KV cache of F16 (--kv-type f16)"
    if not foreign:
        yield "flash attention and other backends than the CPU"


def other_pairs(isolators: Sequence[Isolator]) -> str:
    """Which right values were recorded with RoPE's pairs in another order, as a sentence; "" if none were."""
    kinds: dict[str, dict[str, None]] = {}
    for isolator in isolators:
        for name in isolator.recorded_otherwise():
            kinds.setdefault(isolator.records[name].pairs, {})[parse(name).kind] = None
    agree = "what is made from them had llama.cpp's order (rope_pairs in a --map file settles it)"
    return "; ".join(f"{', '.join(names)} recorded as {pairs}: {agree}" for pairs, names in kinds.items())
