"""ggml's operations as pure functions, one for each `ggml_op` that occurs in the graph of a language model.

`OPERATIONS[name](*operands, params=…, shape=…)` computes a node. Values are NumPy or CuPy arrays of four dimensions in NumPy's order
(ggml's `ne` reversed: the fastest dimension is the last); an operand that the node lacks is None. Each function names the C
function that it mirrors and computes in the dtype of its operands: in float32 as ggml's CPU backend does, in float64 for the
same result without float32's rounding.
"""

from .params import OpParams
from .table import OPERATIONS, operation
from .views import VIEWS, strided

__all__ = ["OPERATIONS", "VIEWS", "OpParams", "operation", "strided"]
