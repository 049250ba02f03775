"""Turns llama.cpp's graph into our steps: nodes that together are one operation of `engine.ops` become one step, every other node a
step of its own."""

from .lift import Lifted, lift

__all__ = ["Lifted", "lift"]
