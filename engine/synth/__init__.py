"""Models with seeded random weights: qwen2 and llama of any shape (`dense`), any other architecture by a recipe (`recipes`)."""

from .dense import PRESETS, Shape, shape_like, synthesize

__all__ = ["PRESETS", "Shape", "shape_like", "synthesize"]
