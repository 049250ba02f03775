"""Somebody else's engine in NumPy: Qwen2 and Llama, any weight type (dequantised by gguf-py), several prompts at once, state files.

    foreign_engine.py MODEL SEQUENCES OUT [--points P] [--portions 4,2] [--state FILE] [--ubatch N] [--fault F]

It knows nothing of parity but the lines that it prints. SEQUENCES are ids with commas, prompts with semicolons: `1,2,3;4,5`; with
--portions a single prompt is computed in passes of these sizes, with --ubatch in passes of at most so many tokens. With --state
it goes on from FILE if that is there, and leaves its keys and values in it at the end.

FAULT is a mistake that engines make: "rope" rotates the other architecture's pairs; "pad" lets prompts see the padding in front of
longer ones; "leak" gives all prompts the first one's first key and value; "state" forgets to save the values of the last position;
"ubatch" counts the positions of each pass from 0.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize


def refuse(why: str) -> None:
    print(f"foreign_engine: {why}", file=sys.stderr)
    raise SystemExit(2)


class Model:
    """Sizes and float32 weights, straight from gguf-py."""

    def __init__(self, path: str) -> None:
        reader = GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        self.kind = facts["general.architecture"]
        if self.kind not in ("qwen2", "llama"):
            refuse("it computes qwen2 and llama only")
        own = {name.removeprefix(self.kind + "."): value for name, value in facts.items()}
        if own.get("expert_count") or "rope.scaling.factor" in own:
            refuse("it has neither experts nor RoPE scaling")
        self.layers, self.width, self.heads = own["block_count"], own["embedding_length"], own["attention.head_count"]
        self.kv_heads = own.get("attention.head_count_kv", self.heads)
        self.size = own.get("attention.key_length", self.width // self.heads)
        self.eps, self.base = own["attention.layer_norm_rms_epsilon"], own.get("rope.freq_base", 10000.0)
        self.weights = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        if "rope_freqs.weight" in self.weights:
            refuse("it has no RoPE factors")

    def product(self, name: str, x: np.ndarray) -> np.ndarray:
        """x · Wᵀ + b; without an output matrix the embedding is used again."""
        if name == "output" and "output.weight" not in self.weights:
            name = "token_embd"
        y = x @ self.weights[f"{name}.weight"].astype(np.float32).T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """RMS norm over the last axis."""
        mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
        return (x / np.sqrt(mean + self.eps)).astype(np.float32) * self.weights[f"{name}.weight"]


def rotated(x: np.ndarray, positions: np.ndarray, base: float, *, neighbours: bool) -> np.ndarray:
    """RoPE as a product with e^{iθ}: x [B, T, heads, size] as complex pairs."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * base ** (-np.arange(half, dtype=np.float64) / half)
    turn = np.exp(1j * angles)[:, :, None, :]
    if neighbours:
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape).astype(np.float32)
    pairs = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([pairs.real, pairs.imag], axis=-1).astype(np.float32)


class Engine:
    """A batch of prompts, padded in front, so that their last tokens are computed together."""

    def __init__(self, model: Model, out: Any, points: set[str], fault: str) -> None:
        self.model, self.out, self.points, self.fault = model, out, points, fault
        self.cache: dict[str, np.ndarray] = {}
        self.done = 0
        self.step = 0

    def print(self, name: str, values: np.ndarray, padding: np.ndarray) -> None:
        """Lines for a value [B, T, n]: one for each prompt and position that is no padding."""
        if self.points and name not in self.points:
            return
        for seq, rows in enumerate(values):
            for t, row in enumerate(rows):
                position = self.done + t - int(padding[seq])
                if position >= 0:
                    line = {"checkpoint": name, "seq": seq, "token_idx": position, "step": self.step, "values": "@"}
                    text = ",".join(f"{x:.9g}" for x in row)
                    self.out.write(json.dumps(line).replace('"@"', f"[{text}]") + "\n")

    def forward(self, ids: np.ndarray, padding: np.ndarray) -> None:
        """One pass over ids [B, T]; the first `padding[b]` columns of a prompt's whole row are none of its tokens."""
        m, (batch, count) = self.model, ids.shape
        columns = self.done + np.arange(count)
        positions = columns[None, :] - padding[:, None]
        turned = positions - self.done if self.fault == "ubatch" else positions
        neighbours = (m.kind == "llama") != (self.fault == "rope")
        x = m.weights["token_embd.weight"].astype(np.float32)[ids]
        self.print("embd", x, padding)
        for layer in range(m.layers):
            at = f"blk.{layer}"
            n = m.norm(f"{at}.attn_norm", x)
            q, k, v = (m.product(f"{at}.attn_{which}", n) for which in "qkv")
            for name, value in (("attn_norm", n), ("q", q), ("k", k), ("v", v)):
                self.print(f"{at}.{name}", value, padding)
            q = rotated(q.reshape(batch, count, m.heads, m.size), turned, m.base, neighbours=neighbours)
            k = rotated(k.reshape(batch, count, m.kv_heads, m.size), turned, m.base, neighbours=neighbours)
            self.print(f"{at}.q_rope", q.reshape(batch, count, -1), padding)
            self.print(f"{at}.k_rope", k.reshape(batch, count, -1), padding)
            keys, values = self.kept(f"{at}.k", k), self.kept(f"{at}.v", v.reshape(k.shape))
            attended = self.attention(q, keys, values, columns, padding).reshape(batch, count, -1)
            self.print(f"{at}.kqv_out", attended, padding)
            attended = m.product(f"{at}.attn_output", attended)
            x = x + attended
            n = m.norm(f"{at}.ffn_norm", x)
            gate, up = m.product(f"{at}.ffn_gate", n), m.product(f"{at}.ffn_up", n)
            with np.errstate(over="ignore"):
                acted = gate / (1 + np.exp(-gate)) * up
            down = m.product(f"{at}.ffn_down", acted)
            for name, value in (
                ("attn_out", attended), ("ffn_inp", x), ("ffn_norm", n), ("ffn_gate", gate), ("ffn_up", up),
                ("ffn_swiglu", acted), ("ffn_out", down), ("l_out", x + down),
            ):  # fmt: skip
                self.print(f"{at}.{name}", value, padding)
            x = x + down
        x = m.norm("output_norm", x)
        self.print("output_norm", x, padding)
        self.print("logits", m.product("output", x), padding)
        self.done += count
        self.step += 1

    def kept(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The rows of all passes so far: [B, S, heads, size]."""
        self.cache[name] = np.concatenate([self.cache[name], rows], axis=1) if name in self.cache else rows
        return self.cache[name]

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, columns: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """Each query sees the columns up to its own, but for the padding."""
        if self.fault == "leak":
            every = np.arange(len(padding))
            k, v = k.copy(), v.copy()
            k[every, padding], v[every, padding] = k[0, padding[0]], v[0, padding[0]]
        groups = self.model.heads // self.model.kv_heads
        k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
        scores = np.einsum("bthd,bshd->bhts", q, k) / np.float32(np.sqrt(self.model.size))
        every = np.arange(k.shape[1])
        seen = every[None, None, :] <= columns[None, :, None]
        if self.fault != "pad":
            seen = seen & (every[None, None, :] >= padding[:, None, None])
        scores = np.where(seen[:, None], scores, -np.inf)
        blank = ~seen.any(-1)[:, None, :, None]  # rows of padding see nothing
        weights = np.exp(scores - np.where(blank, 0, scores.max(-1, keepdims=True)))
        weights /= np.where(blank, 1, weights.sum(-1, keepdims=True))
        return np.einsum("bhts,bshd->bthd", weights.astype(np.float32), v)

    def load(self, path: Path) -> None:
        with np.load(path) as kept:
            self.cache = dict(kept)
        self.done = next(iter(self.cache.values())).shape[1]
        self.step = 1

    def save(self, path: Path) -> None:
        if self.fault == "state":
            for name, rows in self.cache.items():
                if name.endswith(".v"):
                    rows[:, -1] = 0
        with path.open("wb") as file:
            np.savez(file, **self.cache)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("sequences")
    parser.add_argument("out")
    for option in ("points", "portions", "state", "fault"):
        parser.add_argument(f"--{option}", nargs="?", default="", const="")
    parser.add_argument("--ubatch", type=int, default=0)
    given = parser.parse_args()
    model = Model(given.model)
    prompts = [[int(number) for number in prompt.split(",")] for prompt in given.sequences.split(";")]
    longest = max(map(len, prompts))
    padding = np.array([longest - len(prompt) for prompt in prompts])
    ids = np.array([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    with Path(given.out).open("w") as out:
        header = {"type": "header", "format": 1, "source": "foreign_engine", "compute": "f32"}
        out.write(json.dumps(header | ({"tokens": prompts[0]} if len(prompts) == 1 else {})) + "\n")
        engine = Engine(model, out, set(filter(None, given.points.split(","))), given.fault)
        state = Path(given.state) if given.state else None
        if state is not None and state.exists():
            engine.load(state)
        sizes = [int(size) for size in given.portions.split(",")] if given.portions else [longest - engine.done]
        for size in sizes:
            for first in range(0, size, given.ubatch or size):
                begin = engine.done
                engine.forward(ids[:, begin : begin + min(given.ubatch or size, size - first)], padding)
        if state is not None:
            engine.save(state)


if __name__ == "__main__":
    main()
