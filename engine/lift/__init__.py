"""From llama.cpp's graph to our steps: nodes that together are one operation of `engine.ops` become one step, others one each."""

from .lift import Lifted, lift

__all__ = ["Lifted", "lift"]
