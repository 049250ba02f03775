"""llama.cpp through llama-cpp-python, in a child process. Knows nothing of our engine and of comparisons."""

from .client import Reference
from .jobs import EXACT, NATIVE, Description, DumpJob, DumpResult, Node, Source, Tokens

__all__ = ["EXACT", "NATIVE", "Description", "DumpJob", "DumpResult", "Node", "Reference", "Source", "Tokens"]
