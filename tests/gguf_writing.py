"""The end of writing a GGUF, which is the same for every file that a test makes."""

from collections.abc import Mapping

import gguf
import numpy as np


def finish(writer: gguf.GGUFWriter, tensors: Mapping[str, np.ndarray] | None = None) -> None:
    """Write what a writer was told of, and these tensors as float32."""
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
