"""Somebody else's engine in NumPy for seven families of decoders, float64 inside; what a file can't express is wrong on request.

It knows nothing of parity: weights come from gguf-py, formulas from the papers and model cards. One prompt, no cache. What differs
between families is read from the file's metadata and tensors, but for three habits that no file says (`HABITS`).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Which pairs RoPE turns, the activation, and in which layers of the pattern (n, of n) attention has no window.
HABITS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "llama": ("norm", "silu", ()),
    "granite": ("norm", "silu", ()),
    "qwen3": ("neox", "silu", ()),
    "qwen3moe": ("neox", "silu", ()),
    "phi3": ("neox", "silu", ()),
    "gemma3": ("neox", "gelu", (5, 6)),
    "gpt-oss": ("neox", "oai", (1, 2)),
}


class Families:
    """The engine of one model file, with or without a mistake; `run` gives the points that it prints."""

    def __init__(self, path: Path, fault: str = "", arithmetic: str = "f64") -> None:
        reader = GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        self.kind = str(facts["general.architecture"])
        self.own = {name.removeprefix(self.kind + "."): value for name, value in facts.items()}
        self.weights = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64) for tensor in reader.tensors
        }
        self.fault, self.arithmetic = fault, arithmetic
        self.pairs, self.activation, self.pattern = HABITS[self.kind]
        self.layers, self.width, self.heads = (
            int(self.own[key]) for key in ("block_count", "embedding_length", "attention.head_count")
        )
        self.kv_heads = int(self.own["attention.head_count_kv"])
        self.size = int(self.own.get("attention.key_length", self.width // self.heads))
        self.eps = float(self.own["attention.layer_norm_rms_epsilon"])

    def has(self, fault: str) -> bool:
        return self.fault == fault

    def rounded(self, x: Floats) -> Floats:
        """An operand of a product, as the arithmetic holds it."""
        if self.arithmetic == "f64":
            return x
        if self.arithmetic == "f32":
            return x.astype(np.float32).astype(np.float64)
        if self.arithmetic == "f16":
            return x.astype(np.float16).astype(np.float64)
        bits = x.astype(np.float32).view(np.uint32)  # bfloat16: to nearest, ties to even
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)

    def product(self, name: str, x: Floats, expert: int | None = None) -> Floats:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        if expert is not None:
            weight, bias = weight[expert], None if bias is None else bias[expert]
        product = self.rounded(x) @ self.rounded(weight).T
        return product if bias is None else product + bias

    def norm(self, name: str, x: Floats) -> Floats:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.weights[f"{name}.weight"]

    def windowed(self, layer: int) -> bool:
        """Whether a layer's attention has a window: those of the pattern's last place in each n have none."""
        return bool(self.pattern) and layer % self.pattern[1] < self.pattern[0]

    def rotated(self, x: Floats, layer: int) -> Floats:
        """[T, heads, d] turned by the position."""
        dims, positions = int(self.own.get("rope.dimension_count", self.size)), np.arange(len(x))
        base = float(self.own.get("rope.freq_base", 1e4))
        if self.windowed(layer) and not self.has("one base"):
            base = float(self.own.get("rope.freq_base_swa", base))
        frequencies, magnitude = base ** (-np.arange(0, dims, 2) / dims), 1.0
        if self.own.get("rope.scaling.type") == "yarn":
            frequencies, magnitude = self.yarn(frequencies, base, dims)
        angles = positions[:, None] * frequencies
        cos, sin = (np.cos(angles) * magnitude)[:, None], (np.sin(angles) * magnitude)[:, None]
        pairs = ("norm" if self.pairs == "neox" else "neox") if self.has("pairs") else self.pairs
        first, second = (
            (slice(0, dims // 2), slice(dims // 2, dims)) if pairs == "neox" else (slice(0, dims, 2), slice(1, dims, 2))
        )
        a, b = x[..., first], x[..., second]
        out = x.copy()
        out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
        return out

    def yarn(self, frequencies: Floats, base: float, dims: int) -> tuple[Floats, float]:
        """YaRN (Peng et al. 2023): β 32 and 1, the ramp over whole dimensions, the magnitude 0.1 · ln(s) + 1."""
        factor, context = float(self.own["rope.scaling.factor"]), float(self.own["rope.scaling.original_context_length"])

        def correction(turns: float) -> float:
            return dims * np.log(context / (turns * 2 * np.pi)) / (2 * np.log(base))

        low, high = max(0, np.floor(correction(32))), min(dims - 1, np.ceil(correction(1)))
        kept = 1 - np.clip((np.arange(dims // 2) - low) / max(0.001, high - low), 0, 1)
        if self.has("no ramp"):
            kept = kept * 0
        grown = 0.1 * np.log(factor) + 1
        magnitude = {"no magnitude": 1.0, "magnitude squared": grown**2}.get(self.fault, grown)
        return frequencies / factor * (1 - kept) + frequencies * kept, float(magnitude)

    def heads_of(self, layer: int, x: Floats) -> tuple[Floats, Floats, Floats]:
        """Queries, keys, values [T, heads, d]."""
        b, size = f"blk.{layer}.", self.size
        if f"{b}attn_qkv.weight" in self.weights:
            whole = self.product(f"{b}attn_qkv", x)
            cuts = (self.heads * size, (self.heads + self.kv_heads) * size)
            q, k, v = np.split(whole, cuts, axis=1)
            if self.has("qkv order"):
                k, v = v, k
        else:
            q, k, v = (self.product(f"{b}attn_{name}", x) for name in "qkv")
        q, k, v = (rows.reshape(len(x), -1, size) for rows in (q, k, v))
        normed = f"{b}attn_q_norm.weight" in self.weights
        if normed and not self.has("norm after RoPE"):
            q, k = self.norm(f"{b}attn_q_norm", q), self.norm(f"{b}attn_k_norm", k)
        q, k = self.rotated(q, layer), self.rotated(k, layer)
        if normed and self.has("norm after RoPE"):
            q, k = self.norm(f"{b}attn_q_norm", q), self.norm(f"{b}attn_k_norm", k)
        return q, k, v

    def attention(self, layer: int, x: Floats) -> Floats:
        q, k, v = self.heads_of(layer, x)
        repeated = self.heads // self.kv_heads
        index = np.arange(self.heads) % self.kv_heads if self.has("modulo") else np.arange(self.heads) // repeated
        k, v = k[:, index], v[:, index]
        scale = float(self.own.get("attention.scale", self.size**-0.5))
        scores = np.einsum("thd,shd->hts", self.rounded(q), self.rounded(k)) * scale
        t, s = np.arange(len(x))[:, None], np.arange(len(x))[None, :]
        seen = s <= t + self.has("sees the next")
        if self.windowed(layer):
            seen = seen & (s > t - int(self.own["attention.sliding_window"]) - self.has("window one more"))
        if self.has("chunks of 4"):
            seen = seen & (s // 4 == t // 4)
        scores = np.where(seen, scores, -np.inf)
        sinks = self.weights.get(f"blk.{layer}.attn_sinks.weight")
        if sinks is not None and not self.has("no sinks"):
            scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))], axis=2)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights = (weights / weights.sum(axis=2, keepdims=True))[:, :, : len(x)]
        mixed = np.einsum("hts,shd->thd", self.rounded(weights), self.rounded(v))
        return self.product(f"blk.{layer}.attn_output", mixed.reshape(len(x), -1))

    def activated(self, gate: Floats, up: Floats) -> Floats:
        if self.has("gate and up in turn"):
            both = np.concatenate([gate, up], axis=-1)
            gate, up = both[..., 0::2], both[..., 1::2]
        kind = {"relu": "relu", "gelu for silu": "gelu"}.get(self.fault, self.activation)
        if kind == "oai":
            limit = np.inf if self.has("no limit") else 7.0
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            return gate / (1 + np.exp(-1.702 * gate)) * (up + (0 if self.has("no +1") else 1))
        functions: dict[str, Callable[[Floats], Floats]] = {
            "silu": lambda x: x / (1 + np.exp(-x)),
            "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
            "relu": lambda x: np.maximum(x, 0),
        }
        return functions[kind](gate) * up

    def feed_forward(self, layer: int, x: Floats) -> Floats:
        b = f"blk.{layer}."
        if f"{b}ffn_gate_inp.weight" in self.weights:
            return self.experts(b, x)
        if f"{b}ffn_gate.weight" in self.weights:
            gate, up = self.product(f"{b}ffn_gate", x), self.product(f"{b}ffn_up", x)
        else:
            gate, up = np.split(self.product(f"{b}ffn_up", x), 2, axis=1)
        return self.product(f"{b}ffn_down", self.activated(gate, up))

    def experts(self, b: str, x: Floats) -> Floats:
        logits = self.product(f"{b}ffn_gate_inp", x)
        used = int(self.own["expert_used_count"])
        out = np.zeros_like(x)
        for row, scores in enumerate(logits):
            chosen = np.argsort(-scores, kind="stable")[:used]
            weights = np.exp(scores[chosen] - scores[chosen].max())  # the same as normalising the chosen of a soft max over all
            weights /= weights.sum()
            if self.has("not normalised"):
                whole = np.exp(scores - scores.max())
                weights = (whole / whole.sum())[chosen]
            if self.has("weights exchanged"):
                weights = weights[::-1]
            if self.has("sigmoid"):
                weights = 1 / (1 + np.exp(-scores[chosen]))
                weights /= weights.sum()
            for expert, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
                gate, up = (self.product(f"{b}ffn_{name}_exps", x[row : row + 1], expert) for name in ("gate", "up"))
                out[row] += weight * self.product(f"{b}ffn_down_exps", self.activated(gate, up), expert)[0]
        return out

    def run(self, tokens: tuple[int, ...]) -> dict[str, Floats]:
        """The default points, [T, …] each."""
        x = self.weights["token_embd.weight"][list(tokens)] * float(self.own.get("embedding_scale", 1.0))
        if self.kind == "gemma3" and not self.has("embedding not scaled"):
            x = x * np.float64(np.float32(np.sqrt(self.width)))
        values: dict[str, Floats] = {"embd": x}
        residual = float(self.own.get("residual_scale", 1.0))
        for layer in range(self.layers):
            b = f"blk.{layer}."
            attended = self.attention(layer, self.norm(f"{b}attn_norm", x))
            sandwich = f"{b}post_ffw_norm.weight" in self.weights
            if sandwich and not self.has("no post-norm"):
                attended = self.norm(f"{b}post_attention_norm", attended)
            before, x = x, x + residual * attended
            norm = f"{b}ffn_norm" if f"{b}ffn_norm.weight" in self.weights else f"{b}post_attention_norm"
            fed = self.feed_forward(layer, self.norm(norm, before if self.has("parallel") else x))
            if sandwich and not self.has("no post-norm"):
                fed = self.norm(f"{b}post_ffw_norm", fed)
            x = (before if self.has("old residual") else x) + residual * fed
            values[f"{b}l_out"] = x
        values["output_norm"] = self.norm("output_norm", x)
        output = "output" if "output.weight" in self.weights else "token_embd"
        values["logits"] = self.product(output, values["output_norm"]) / float(self.own.get("logit_scale", 1.0))
        return values


def lines(recorded: dict[str, Any], size: int = 16) -> list[dict[str, Any]]:
    """What the engine prints: the leading values of each row."""
    return [
        {"checkpoint": point, "token_idx": row, "values": [float(np.float32(value)) for value in values[:size]]}
        for point, rows in recorded.items()
        for row, values in enumerate(rows)
    ]


def main() -> None:
    """MODEL 1,2,3 OUT [FAULT]: as `parity run --exec` starts it."""
    model, tokens, out, *fault = sys.argv[1:]
    outcome = Families(Path(model), *fault).run(tuple(map(int, tokens.split(","))))
    Path(out).write_text("".join(json.dumps(line) + "\n" for line in lines(outcome)))


if __name__ == "__main__":
    main()
