"""Block formats -> float32 (stand-in until the formats are written out)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def dequantize(raw: NDArray[np.uint8], kind: int, n_cols: int) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as reference

    del n_cols
    made: Any = reference(raw, GGMLQuantizationType(kind))
    return np.asarray(made, dtype=np.float32)


def dequantize_into(out: NDArray[np.float32], raw: NDArray[np.uint8], kind: int) -> None:
    out[:] = dequantize(raw, kind, out.shape[1])
