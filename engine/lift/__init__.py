"""From llama.cpp's graph to our steps: neighbours that are one operation of the house become its step, every other node its own."""

from .lift import Lifted, lift

__all__ = ["Lifted", "lift"]
