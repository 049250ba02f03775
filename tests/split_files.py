"""A model in several files, as llama-gguf-split writes them."""

from pathlib import Path

from gguf import GGUFReader, GGUFWriter
from gguf_writing import finish


def split(model: Path, out: Path, parts: int = 2) -> Path:
    """Write the model as parts beside `out`; returns the first one."""
    whole = GGUFReader(model)
    most = -(-len(whole.tensors) // parts)
    writer = GGUFWriter(out, whole.fields["general.architecture"].contents(), split_max_tensors=most)
    for key, field in whole.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)
    return part(out, 1, parts)


def part(out: Path, number: int, parts: int) -> Path:
    """The name of a part, counted from 1, of a model that was split to `out`."""
    return out.with_name(f"{out.stem}-{number:05d}-of-{parts:05d}.gguf")
