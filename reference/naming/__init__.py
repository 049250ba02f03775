"""From ggml's nodes to points: which node of the graph stands for which name of the vocabulary.

ggml's names repeat (`Qcur-0` is a product, a sum, a view and a rotation), change between versions and sometimes mislead, so a
point is recognised by the graph itself: which weight is multiplied, what attention reads, where a layer begins. A node that
fits no point keeps its own name as `blk.N.<node>`.
"""

from .plan import plan
from .planned import VIEWS, Planned, Signature, Signer

__all__ = ["VIEWS", "Planned", "Signature", "Signer", "plan"]
