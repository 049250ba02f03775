"""ggml's operations as pure functions, one for each `ggml_op` that the graph of a language model holds.

`OPERATIONS[name](*operands, params=…, shape=…)` computes a node. Values are NumPy or CuPy arrays of four dimensions in NumPy's order
(ggml's `ne` reversed: the fastest dimension is the last); an operand that the node lacks is None. Each function names the C
function that it mirrors and computes in the dtype of its operands: float32 as ggml's CPU backend does, float64 for the same
result without rounding.
"""

from .params import OpParams
from .table import OPERATIONS, operation
from .views import VIEWS, strided

__all__ = ["OPERATIONS", "VIEWS", "OpParams", "operation", "strided"]
