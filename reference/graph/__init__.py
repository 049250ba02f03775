"""Records the graph of a model: what every node is made from, with sizes that hold for every length.

Nothing is computed: the callback declines every node, and the abort callback stops each pass at its first one. Passes of two
lengths over a cache filled to two lengths tell which sizes depend on T and S; a further pass, of another length, is the proof. The
cache is filled without computing, too: a pass whose callback leaves after the first node counts as done.
"""

from .record import record

__all__ = ["record"]
