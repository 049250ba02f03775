"""Models with seeded random weights: qwen2 and llama of any shape (`dense`), any other architecture by a recipe (`recipes`)."""

from .dense import synthesize
from .shape import PRESETS, Shape, shape_like

__all__ = ["PRESETS", "Shape", "shape_like", "synthesize"]
