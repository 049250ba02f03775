"""The Python recorder's values with heads as a dimension of their own: their rows are positions', whatever stands where."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints.reading.reader import read
from parity.emit.python import single_file
from parity.emit.recorder import Recorder

T, HEADS, KV_HEADS, SIZE = 5, 4, 2, 8
RIGHT = np.random.default_rng(0).standard_normal((T, HEADS, SIZE)).astype(np.float32)
PARTS = {"heads": HEADS, "kv_heads": KV_HEADS, "head_size": SIZE}


def recorded(
    path: Path, point: str, *values: NDArray[np.float32], before: tuple[int, ...] = (), **known: Any
) -> list[list[float]]:
    """The rows that a recorder writes of a point's values, each behind an embedding of the shape `before` if there is one."""
    with Recorder(path / "d.jsonl", compute="f32", layers=4, slice_size=64, **known) as tap:
        for value in values:
            if before:
                tap("embd", np.zeros(before, np.float32))
            tap(point, value)
    rows = read(path / "d.jsonl").points[point]
    assert set(rows.seq.tolist()) == {0}
    return [row.tolist() for row in rows.values]


LAYOUTS = {
    "[T, heads × n]": RIGHT.reshape(T, -1),
    "[B, T, heads × n]": RIGHT.reshape(1, T, -1),
    "[T, heads, n]": RIGHT,
    "[heads, T, n]": RIGHT.swapaxes(0, 1),
    "[B, T, heads, n]": RIGHT[None],
    "[B, heads, T, n]": RIGHT.swapaxes(0, 1)[None],
}
EVIDENCE: dict[str, dict[str, Any]] = {
    "heads": {"hparams": PARTS},
    "the prompt": {"tokens": range(T)},
    "the pass": {"before": (T, 16)},
    "a pass with sequences": {"before": (1, T, 16)},
}


@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_a_position_s_heads_side_by_side(layout: str, evidence: str, tmp_path: Path) -> None:
    """In each layout, by what the model says of heads, by the prompt's length, or by another point of the same pass."""
    assert recorded(tmp_path, "blk.1.q_rope", LAYOUTS[layout], **EVIDENCE[evidence]) == RIGHT.reshape(T, -1).tolist()


@pytest.mark.parametrize(
    "shape", [(1, HEADS, SIZE), (1, 1, HEADS, SIZE), (1, HEADS, 1, SIZE), (1, 1, HEADS * SIZE), (HEADS, SIZE)]
)
@pytest.mark.parametrize("evidence", [{"hparams": PARTS}, {"tokens": range(T)}], ids=["heads", "width before"])
def test_a_decode_step_is_one_row(shape: tuple[int, ...], evidence: dict[str, Any], tmp_path: Path) -> None:
    """After a prefill one token's heads are one row, not a row each."""
    step = RIGHT[:1].reshape(shape)
    assert len(recorded(tmp_path, "blk.1.q_rope", RIGHT, step, **evidence)) == T + 1


def test_what_nothing_decides_is_refused(tmp_path: Path) -> None:
    """Where neither model nor pass decides, or there are as many heads as tokens, the recorder says in one line what to give it."""
    for value, known in ((RIGHT, {}), (RIGHT[None], {}), (RIGHT[None, :HEADS], {"hparams": PARTS, "tokens": range(HEADS)})):
        with pytest.raises(ValueError, match=r"^blk\.1\.q: nothing says whether \[.*\] is \[.* or \[.*; give .*hparams=.*$"):
            recorded(tmp_path, "blk.1.q", value, **known)


def test_an_earlier_pass_s_points_decide_nothing(tmp_path: Path) -> None:
    """A layer's output, recorded behind the queries, tells the length of its own pass only."""
    with Recorder(tmp_path / "d.jsonl", compute="f32", layers=4, hparams={"heads": HEADS, "head_size": SIZE}) as tap:
        for tokens in (RIGHT, RIGHT[:1]):
            tap("blk.1.q", tokens)
            tap("blk.1.l_out", np.zeros((len(tokens), 16), np.float32))
    assert read(tmp_path / "d.jsonl").points["blk.1.q"].token_idx.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_value_without_a_shape_decides_nothing(tmp_path: Path) -> None:
    """DLPack alone has no shape to be asked before the copy: it is not taken for a single row."""
    embd = np.zeros((T, 16), np.float32)
    wrapped = SimpleNamespace(__dlpack__=embd.__dlpack__, __dlpack_device__=embd.__dlpack_device__)
    with Recorder(tmp_path / "d.jsonl", compute="f32", layers=4, hparams=PARTS) as tap:
        tap("embd", wrapped)
        tap("blk.1.q", RIGHT.reshape(1, T, -1))
    assert read(tmp_path / "d.jsonl").points["blk.1.q"].token_idx.tolist() == list(range(T))


def test_sequences_stay_sequences(tmp_path: Path) -> None:
    """[B, T, n] and [B, T, heads, n] of several prompts are rows of each."""
    values = np.stack([RIGHT, RIGHT + 1])
    with Recorder(tmp_path / "d.jsonl", compute="f32", layers=4, hparams=PARTS) as tap:
        tap("blk.1.q", values.reshape(2, T, -1))
        tap("blk.1.q_rope", values)
    for rows in read(tmp_path / "d.jsonl").points.values():
        assert (rows.seq.tolist(), rows.shapes[0]) == ([0] * T + [1] * T, (HEADS * SIZE,))


def test_prompts_of_one_batch_have_lengths_of_their_own(tmp_path: Path) -> None:
    """Each prompt's rows are told by the other points of the same prompt, not by the prompt before it."""
    with Recorder(tmp_path / "d.jsonl", compute="f32", layers=4, tokens=range(T)) as tap:
        for seq, count in enumerate((T, 3)):
            tap("embd", np.zeros((count, 16), np.float32), seq=seq)
        for seq, count in enumerate((T, 3)):
            tap("blk.1.q", RIGHT[:count], seq=seq)
    assert read(tmp_path / "d.jsonl").points["blk.1.q"].seq.tolist() == [0] * T + [1] * 3


HOOKED = f"""
from types import SimpleNamespace
import torch
from parity_dump import Recorder

class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(16, {HEADS * SIZE})
        self.q_norm = torch.nn.Identity()

    def forward(self, x, heads_first):
        q = self.q_proj(x).unflatten(-1, ({HEADS}, {SIZE}))
        return self.q_norm(q.transpose(-3, -2) if heads_first else q)

for heads_first in (False, True):
    model = torch.nn.Module()
    model.config = SimpleNamespace(num_attention_heads={HEADS}, num_key_value_heads={KV_HEADS}, hidden_size={HEADS * SIZE})
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.layers[0].self_attn = Attention()
    with Recorder(f"{{heads_first}}.jsonl", compute="f32", layers=1, slice_size=64) as tap, torch.no_grad():
        tap.hook(model, {{"layers.0.self_attn.q_proj": "blk.0.q", "layers.0.self_attn.q_norm": "blk.0.q_norm"}})
        for shape in ((1, 3, 16), (3, 16), (1, 1, 16)):
            model.layers[0].self_attn(torch.randn(shape), heads_first)
"""


@pytest.mark.slow
def test_hooks_in_pytorch_take_heads_from_the_configuration(tmp_path: Path) -> None:
    """A norm of heads before or behind the transposition is recorded as its projection is, with nothing given but the model."""
    python = os.environ.get("PARITY_HF_PYTHON")
    if not python:
        pytest.skip("PARITY_HF_PYTHON names no interpreter with torch and transformers")
    (tmp_path / "parity_dump.py").write_text(single_file())
    (tmp_path / "hooked.py").write_text(HOOKED)
    subprocess.run([python, "hooked.py"], cwd=tmp_path, check=True)
    for heads_first in (False, True):
        points = read(tmp_path / f"{heads_first}.jsonl").points
        assert points["blk.0.q"].token_idx.tolist() == points["blk.0.q_norm"].token_idx.tolist() == list(range(7))
        assert (points["blk.0.q"].values == points["blk.0.q_norm"].values).all()
