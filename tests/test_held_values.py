"""What `parity weights --theirs` says of values that no known mishap gives, and of what it did not see."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, refused

from engine.weights.gguf_model import GgufModel
from parity.weights.foreign_weights import check_foreign

NAME = "blk.1.ffn_up.weight"
Change = Callable[[np.ndarray], np.ndarray]


def _zero_from(element: int) -> Change:
    return lambda w: np.where(np.arange(w.size).reshape(w.shape) < element, w, 0)


def _not_a_number(w: np.ndarray) -> np.ndarray:
    w.reshape(-1)[777] = np.nan
    return w


def _other_scales(w: np.ndarray) -> np.ndarray:
    blocks = w.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    return blocks * np.roll(largest, 1) / largest


def _in_eight_bits(w: np.ndarray) -> np.ndarray:
    step = np.abs(w).max(axis=1, keepdims=True) / 127
    return np.random.default_rng(0).permutation(np.round(w / step) * step)


CASES: dict[str, Change] = {
    "zero from element 300 on; those before are right": _zero_from(300),
    "zero throughout": np.zeros_like,
    "the file's values minus 1": lambda w: w - 1,
    "1 value of {total:,} is NaN or infinite, the first at element 777; the others are right": _not_a_number,
    "each value is the one that the file has 32 elements earlier": lambda w: np.roll(w.reshape(-1), 32),
    "each value from element {row5:,} on is the one that the file has 1 row later; those before are right": (
        lambda w: np.concatenate([w[:5], w[6:], w[:1]])
    ),
    "each block of 32 is the file's times a factor of its own: the scale of another block": _other_scales,
    "the file's rows in another order": _in_eight_bits,
    "nothing known gives these values": lambda w: w * (1.001 + 1e-3 * np.random.default_rng(0).random(w.shape)),
}


@pytest.mark.parametrize("sentence", CASES)
def test_values_say_what_they_are(sentence: str, quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """A tensor that differs is described by its values: where they are zero, moved, shifted, rescaled, reordered or no numbers."""
    model = GgufModel(quantized("Q8_0"))
    weight = model.load(NAME)
    said = sentence.format(total=weight.size, row5=5 * weight.shape[1])
    np.savez(tmp_path / "theirs.npz", **{NAME: CASES[sentence](weight.copy()).astype(np.float32)})
    (check,) = check_foreign(model.path, tmp_path / "theirs.npz").tensors
    assert (check.status, check.reason) == ("different", said)


def _lines(path: Path, weight: np.ndarray, starts: tuple[int, ...]) -> Path:
    flat = weight.reshape(-1)
    lines = ({"name": NAME, "start": start, "values": flat[start : start + 100].tolist()} for start in starts)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_right_is_said_of_what_was_seen(parity: Cli, stories: Path, tmp_path: Path) -> None:
    """A hundred leading values do not show zeros behind them: the verdict says how much was seen; a later slice shows the zeros."""
    weight = GgufModel(stories).load(NAME)
    held = _zero_from(256)(weight).astype(np.float32)
    theirs = _lines(tmp_path / "theirs.jsonl", held, (0,))
    ran = parity("weights", "--model", stories, "--theirs", theirs)
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == (
        f"right where seen: 1 of 1 tensor equal, tolerance 2e-6; seen were 100 of their {weight.size:,} values"
    )
    middle = weight.size // 2
    code, answer = parity.json("weights", "--model", stories, "--theirs", _lines(theirs, held, (0, middle)))
    (tensor,) = answer["tensors"]
    assert (code, answer["verdict"], answer["seen"], answer["values"]) == (1, "wrong", 200, weight.size)
    assert (tensor["reason"], tensor["first"]["element"]) == (f"zero from element {middle:,} on", middle)
    code, answer = parity.json(
        "weights", "--model", stories, "--theirs", _lines(theirs, weight, (0, middle, weight.size - 100))
    )
    assert (code, answer["verdict"], answer["seen"]) == (0, "right where seen", 300)
    code, answer = parity.json("weights", "--model", stories, "--theirs", _lines(theirs, weight, (0, 40, 80, middle, middle)))
    assert (code, answer["seen"]) == (0, 280)
    np.savez(tmp_path / "longer.npz", **{NAME: np.append(weight, [1, 2])})
    (note, _) = parity.json("weights", "--model", stories, "--theirs", tmp_path / "longer.npz")[1]["notes"]
    assert note == f"more values than the model has, which were not compared: {NAME} {weight.size + 2:,} ({weight.size:,})"
    np.savez(tmp_path / "whole.npz", **{NAME: weight})
    assert parity.json("weights", "--model", stories, "--theirs", tmp_path / "whole.npz")[1]["verdict"] == "right"


def test_a_slice_that_no_tensor_has_is_refused(parity: Cli, stories: Path, tmp_path: Path) -> None:
    """Values behind the end, values without the leading ones, and a start that is no number exit 2 with one line."""
    weight = GgufModel(stories).load(NAME)
    beyond = np.append(weight, weight[:1])
    theirs = tmp_path / "theirs.jsonl"

    def ran(text: str, *parts: str) -> None:
        theirs.write_text(text)
        refused(parity("weights", "--model", stories, "--theirs", theirs), *parts)

    ran(_lines(theirs, beyond, (0, weight.size)).read_text(), "has no 100 values from element")
    ran(_lines(theirs, weight, (0, weight.size)).read_text(), "has no 0 values from element")
    ran(_lines(theirs, weight, (200,)).read_text(), f"lacks the leading values of {NAME}")
    for start in ("-1", "1.5", "true", '"0"', "null", "[]"):
        ran(f'{{"name": "{NAME}", "start": {start}, "values": [1, 2, 3, 4]}}', "is no element's number")
