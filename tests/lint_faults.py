"""Right dumps of the embedded model, and faults of a capture in them: for tests of lint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.reading.reader import read
from checkpoints.record import Dump, Token
from engine.transformer import Transformer
from parity.lint.generated import SAME_TOKEN
from parity.run.ours import OursJob, dump

PROMPT = (2047, 410, 1200, 88, 911, 410, 5, 6)


def right_dump(transformer: Transformer, out: Path) -> Dump:
    """Every point, 24 leading values, the prompt and three tokens that were chosen greedily."""
    chosen: list[int] = []
    sequence, tokens = transformer.start(), list(PROMPT)
    for _ in range(3):
        tokens = [int(transformer.forward(tokens, sequence).argmax())]
        chosen += tokens
    dump(transformer, OursJob(out, PROMPT, points="all", slice_size=24, generated=tuple(chosen)))
    return read(out)


def whole_dump(transformer: Transformer, out: Path) -> Dump:
    """Whole rows of some points."""
    points = "embd,blk.3.{kq_soft_max,q,l_out},blk.23.l_out,output_norm,logits"
    dump(transformer, OursJob(out, PROMPT, points=points, slice_size=1 << 20))
    return read(out)


def changed(source: Dump, point: str, **columns: Any) -> Dump:
    return replace(source, points={**source.points, point: replace(source.points[point], **columns)})


def valued(source: Dump, point: str, change: Callable[[NDArray[np.float32]], NDArray[Any]]) -> Dump:
    """The dump with other values at one point, without the statistics that would show the change, too."""
    values = change(source.points[point].values.copy()).astype(np.float32)
    return changed(source, point, values=values, stats={}, sketch=None)


def copied(source: Dump, to: str, of: str) -> Dump:
    return replace(source, points={**source.points, to: replace(source.points[of], point=to)})


def swapped_buffers(source: Dump) -> Dump:
    """Two buffers that swap each layer, read at the end of the pass: every odd layer's output is the last layer's."""
    for name in ("embd", "blk.5.l_out", "blk.1.l_out"):
        source = copied(source, name, "blk.23.l_out")
    return source


def stale(source: Dump) -> Dump:
    rows = source.points["blk.7.l_out"]
    return replace(
        source,
        points={
            **source.points,
            "blk.7.l_out": replace(rows.take([0, 1, 2, 2, 4, 5, 6, 7, 7, 9, 10]), token_idx=rows.token_idx),
        },
    )


def replayed(source: Dump) -> Dump:
    """Every decode step has the values of the first."""
    points = {}
    for name, rows in source.points.items():
        taken = np.arange(len(rows))
        taken[rows.decode] = taken[rows.decode][0]
        points[name] = replace(rows, values=rows.values[taken], counts=rows.counts[taken], stats={}, sketch=None)
    return replace(source, points=points)


def replayed_layers(source: Dump) -> Dump:
    """In every decode step each layer's output is the last one's."""
    last, points = source.points["blk.23.l_out"], dict(source.points)
    for name, rows in source.points.items():
        if name.endswith(".l_out"):
            points[name] = replace(rows, values=np.where(rows.decode[:, None], last.values, rows.values), stats={}, sketch=None)
    return replace(source, points=points)


def with_value(value: float, at: int = 3) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
    def change(values: NDArray[np.float32]) -> NDArray[Any]:
        values[:, at] = value
        return values

    return change


def device_memory(values: NDArray[np.float32]) -> NDArray[Any]:
    values[:, ::3], values[:, 1::5] = 0.0, 1.5e18
    return values


def pointers(values: NDArray[np.float32]) -> NDArray[Any]:
    count, width = values.shape
    return (0x7F3A1C04C380 + 64 * np.arange(count * (width // 2), dtype=np.uint64).reshape(count, -1) ** 2).view(np.float32)


def some_zeros(values: NDArray[np.float32]) -> NDArray[Any]:
    values[:, 10:20] = 0.0
    return values


def as_f16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(values).astype(np.float16).view(np.uint16)


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


def bf16_of(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


MISREAD: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "F16 as BF16": lambda x: bf16_of(as_f16(x)),
    "BF16 as F16": lambda x: bf16_bits(x).view(np.float16),
    "pairs of F16 as F32": lambda x: np.repeat(as_f16(x), 2, axis=1)[:, : 2 * x.shape[1]].copy().view(np.float32),
    "pairs of BF16 as F32": lambda x: np.stack([bf16_bits(x), bf16_bits(x[:, ::-1])], 2).reshape(len(x), -1).view(np.float32),
    "F32 as BF16": lambda x: bf16_of(np.ascontiguousarray(x[:, :12]).view(np.uint16)),
    "F32 as F16": lambda x: np.ascontiguousarray(x[:, :12]).view(np.float16),
}


def token_run(ids: list[int]) -> tuple[Token, ...]:
    return tuple(Token(i, number, f" {number}") for i, number in enumerate(ids, 8))


def in_header(source: Dump, **fields: Any) -> Dump:
    assert source.header is not None
    return replace(source, header=replace(source.header, **fields))


def shuffled(source: Dump) -> Dump:
    rows = source.points["embd"]
    return replace(source, points={**source.points, "embd": rows.take([1, 0, *range(2, len(rows))])})


def fewer_values(source: Dump) -> Dump:
    rows = source.points["blk.2.l_out"]
    return changed(source, "blk.2.l_out", values=rows.values[:, :10], counts=np.full(len(rows), 10))


def ramp(values: NDArray[np.float32]) -> NDArray[Any]:
    return np.arange(values.shape[1])[None, :] * 0.25 + np.zeros_like(values)


def integers(values: NDArray[np.float32]) -> NDArray[Any]:
    return np.arange(1, 25, dtype=np.int32)[None, :].repeat(len(values), 0).view(np.float32)


def other_statistic(source: Dump, point: str, name: str, of: str, factor: float) -> Dump:
    stats = source.points[point].stats
    return changed(source, point, stats={**stats, name: source.points[of].stats[name] * factor})


def lacking(source: Dump, point: str, position: int) -> Dump:
    rows = source.points[point]
    return replace(source, points={**source.points, point: rows.take(rows.token_idx != position)})


# rule -> how a capture comes to break it; each is made of a real run.
FAULTS: dict[str, Callable[[Dump], Dump]] = {
    "graph-replay": replayed,
    "same-vector": swapped_buffers,
    "stale-position": stale,
    "idle-layer": lambda d: copied(d, "blk.9.l_out", "blk.8.l_out"),
    "impossible-size": lambda d: valued(d, "blk.5.l_out", device_memory),
    "addresses": lambda d: valued(d, "blk.5.l_out", pointers),
    "non-finite": lambda d: valued(d, "blk.5.l_out", with_value(np.nan)),
    "exact-zeros": lambda d: valued(d, "blk.5.l_out", some_zeros),
    "garbage-logits": lambda d: valued(d, "logits", with_value(40000.0)),
    "flat-row": lambda d: valued(d, "blk.4.attn_out", ramp),
    "denormals": lambda d: valued(d, "blk.4.ffn_up", integers),
    "wrong-dtype": lambda d: valued(d, "blk.4.l_out", MISREAD["F16 as BF16"]),
    "value-count": fewer_values,
    "shape": lambda d: changed(d, "blk.6.l_out", shapes=((77,),) * len(d.points["blk.6.l_out"])),
    "missing-positions": lambda d: lacking(d, "blk.6.q", 3),
    "doubled": lambda d: changed(d, "embd", token_idx=np.zeros(11, np.int64), step=np.zeros(11, np.int64)),
    "out-of-order": shuffled,
    "cut-short": lambda d: replace(d, end=None),
    "statistics": lambda d: other_statistic(d, "blk.6.l_out", "l2", "blk.7.q", 0.01),
    "attention-rows": lambda d: other_statistic(d, "blk.6.kq_soft_max", "sum", "blk.6.kq_soft_max", 0.9),
    "captured-late": lambda d: copied(d, "blk.2.l_out", "blk.23.l_out"),
    "embedding-row": lambda d: in_header(d, tokens=(2047, 410, 1200, 88, 912, 410, 5, 6)),
    "hparams": lambda d: in_header(d, hparams={"eps": 1e-5}),
    "not-argmax": lambda d: replace(d, tokens=(replace(d.tokens[0], id=3), *d.tokens[1:])),
    "repetition": lambda d: replace(d, tokens=token_run([7] * SAME_TOKEN)),
}  # fmt: skip


def one_vector(source: Dump) -> Dump:
    """A layer whose output has one value from position 2 to 7, where one token is repeated."""
    rows = source.points["blk.3.l_out"]
    taken = np.arange(len(rows))
    taken[2:8] = 2
    stale_rows = replace(rows.take(taken.tolist()), token_idx=rows.token_idx)
    return replace(in_header(source, tokens=(2047, 410, *[7] * 6)), points={**source.points, "blk.3.l_out": stale_rows})


def flattened(source: Dump) -> Dump:
    """Uniform attention in one layer."""
    rows = source.points["blk.6.kq_soft_max"]
    values = rows.values.copy()
    for r, (_, seen) in enumerate(rows.shapes):
        values[r] = 1 / seen
    return changed(source, "blk.6.kq_soft_max", values=values, stats={}, sketch=None)


def decoded_prompt(source: Dump) -> Dump:
    """A header that lists every token, where the records say that most were decoded one by one."""
    points = {name: replace(rows, decode=rows.token_idx > 0) for name, rows in source.points.items()}
    return replace(in_header(source, tokens=(2047,) + (7,) * 10), points=points, tokens=())


# Other ways to break a rule: rule, what is wrong, the fault.
VARIANTS: tuple[tuple[str, str, Callable[[Dump], Dump]], ...] = (
    ("flat-row", "7 everywhere", lambda d: valued(d, "blk.4.l_out", lambda x: np.full_like(x, 7))),
    ("flat-row", "0 everywhere", lambda d: valued(d, "blk.4.l_out", np.zeros_like)),
    ("stale-position", "positions 2–7", one_vector),
    ("impossible-size", "1.5e+18", lambda d: valued(d, "blk.5.l_out", with_value(1.5e18))),
    ("impossible-size", "e+18", lambda d: other_statistic(d, "blk.6.l_out", "min", "blk.6.l_out", 1e18)),
    ("non-finite", "inf", lambda d: valued(d, "blk.5.l_out", with_value(-np.inf))),
    ("statistics", "stats.min", lambda d: other_statistic(d, "blk.6.l_out", "max", "blk.6.l_out", 0.0)),
    ("statistics", "n and l2 allow", lambda d: other_statistic(d, "blk.6.l_out", "sum", "blk.6.l_out", 1e4)),
    ("statistics", "contradicts the shape", lambda d: other_statistic(d, "blk.6.l_out", "n", "blk.6.l_out", 2.0)),
    ("statistics", "the sketch", lambda d: changed(d, "blk.6.l_out", sketch=d.points["blk.6.ffn_up"].sketch * 100)),
    ("attention-rows", "the same weight", flattened),
    ("hparams", "heads", lambda d: in_header(d, hparams={"num_attention_heads": 4})),
    ("hparams", "vocab_size", lambda d: in_header(d, hparams={"vocab_size": 32000})),
    ("hparams", "outside the vocabulary", lambda d: in_header(d, tokens=(*PROMPT[:-1], 2048))),
    ("repetition", "cycle of 3 tokens", lambda d: replace(d, tokens=token_run([5, 6, 7] * 8))),
    ("repetition", "token 7", decoded_prompt),
    ("stale-position", "blk.7.l_out", stale),
    ("graph-replay", "all 3 decode steps from position 8 on hold the same values", replayed),
    ("graph-replay", "24 layers have one output in every decode step", replayed_layers),
)  # fmt: skip
