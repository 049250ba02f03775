"""What a pass of the exact mode asks of a CUDA device: kernels launched, and times that the host waits for it.

    python benchmarks/launches.py [RECIPE …]

A qwen2 of 8 layers (the 0.5 B shape) through steps lifted from llama.cpp's graph and through those written by hand, then small models
by recipe, lifted: a prompt of 32 tokens, and one more token. Counted by PyTorch's profiler (CUPTI), which sees CuPy's calls, in the
second pass of its kind. A pass ends with the logits brought to the host: that is one wait.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from checkpoints.graph import RecordedGraph
from engine.backend import choose
from engine.synth import shape_like, synthesize
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.models.embedded import path as embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

WIDE = {"layers": 8, "width": 896, "heads": 14, "kv_heads": 2, "ff": 4864}  # a third of the layers of a 0.5 B model
PROMPT = [50 + (37 * i + 11) % 1900 for i in range(32)]
NOT_KERNELS = ("Memcpy", "Memset")


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=["qwen3", "gemma3", "qwen3moe", "deepseek2", "mamba"])
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    print("| model | pass | kernels | copies from the device | copies to it | other waits |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, Reference() as reference:
        model = Path(folder) / "model.gguf"
        synthesize(model, shape_like("tiny", **WIDE), weight_type="f16", tokenizer=embedded())
        count("qwen2, 8 layers, written by hand", model, None)
        count("qwen2, 8 layers, lifted", model, reference.graph(model))
        for name in options.names:
            path = Path(folder) / f"{name}.gguf"
            make_by_recipe(path, RECIPES[name], shape_of(RECIPES[name]), {}, tokenizer=embedded())
            count(f"{name}, lifted", path, reference.graph(path))


def count(name: str, model: Path, recorded: RecordedGraph | None) -> None:
    """Print one model's two rows."""
    engine = Transformer(GgufModel(model), choose("cupy"), recorded=recorded)
    sequence = engine.start()
    for tokens in (PROMPT, PROMPT[:1]):  # weights and kernels are made
        engine.forward(tokens, sequence)
    sequence = engine.start()
    for what, tokens in (("32 tokens", PROMPT), ("one more", PROMPT[:1])):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            engine.forward(tokens, sequence)
        counts: Counter[str] = Counter()
        for event in seen.events() or ():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kind = next((kind for kind in ("DtoH", "HtoD", *NOT_KERNELS) if kind in event.name), "kernel")
                counts[kind] += 1
            elif "Synchronize" in event.name:
                counts[event.name] += 1
        waits = ", ".join(f"{key} {number}" for key, number in sorted(counts.items()) if "Synchronize" in key)
        print(f"| {name} | {what} | {counts['kernel']} | {counts['DtoH']} | {counts['HtoD']} | {waits} |", flush=True)


if __name__ == "__main__":
    main()
