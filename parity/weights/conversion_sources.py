"""Where each tensor of a GGUF comes from in a Hugging Face folder: names, stacked experts, grouped projections."""

import re

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.errors import InputError

from .safetensors_folder import Floats, Folder, Stored

_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class TensorSource(Struct, frozen=True):
    """Where a tensor of the GGUF comes from: one tensor, or one for each expert.

    `in_groups`: a fused projection as the folder stores it, from which `parts` is reordered.
    """

    parts: tuple[Stored, ...]
    names: tuple[str, ...]
    in_groups: "TensorSource | None" = None

    def rows(self, start: int, stop: int, per_part: int, *, transposed: bool = False) -> Floats:
        """Rows [start, stop) of the concatenated parts; they must lie in one part."""
        part = self.parts[start // per_part]
        first = start % per_part
        if len(part.shape) == 1:
            return part.part()[None]
        if transposed:
            return np.ascontiguousarray(part.part((slice(None), slice(first, first + stop - start))).T)
        if len(part.shape) == 3:  # experts that are stacked already
            rows = part.shape[1]
            return part.part((start // rows, slice(start % rows, start % rows + stop - start)))
        return part.part(slice(first, first + stop - start))


def sources_of(arch: str, layers: int, folder: Folder) -> tuple[dict[str, TensorSource], list[str]]:
    """The source of each GGUF tensor by its name, and the folder's tensors from which none is made."""
    import gguf

    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    if kind is None:
        raise InputError(f"gguf-py has no names of the architecture {arch}.", "Conversion cannot be checked for it.")
    names = gguf.get_tensor_name_map(kind, layers)
    sources: dict[str, TensorSource] = {}
    experts: dict[str, dict[int, str]] = {}
    stray: list[str] = []
    for name, stored in folder.tensors.items():
        if match := _EXPERT.fullmatch(name):
            head = match[1].replace("block_sparse_moe", "mlp")
            experts.setdefault(f"{head}.experts.{_MIXTRAL.get(match[3], match[3])}.weight", {})[int(match[2])] = name
            continue
        plain = name.replace("model.language_model.", "model.")
        # As the converters of BLOOM and Mamba 2 change them.
        spellings = (plain, plain.removeprefix("transformer."), plain.replace(".dt_bias", ".dt_proj.bias"))
        to = next(filter(None, (names.get_name(text, try_suffixes=(".weight", ".bias")) for text in spellings)), None)
        if to is None:
            stray.append(name)
        else:
            sources[to] = TensorSource((stored,), (name,))
    for joined, members in experts.items():
        to = names.get_name(joined, try_suffixes=(".weight",))
        if to is None or sorted(members) != list(range(len(members))):
            stray += members.values()
            continue
        ordered = tuple(members[number] for number in range(len(members)))
        sources[to] = TensorSource(tuple(folder.tensors[name] for name in ordered), ordered)
    return sources, stray


def ungrouped(source: TensorSource, heads: tuple[int, int]) -> TensorSource:
    """A fused projection whose rows are grouped (queries, then a key head and a value head for each group), reordered to all queries,
    keys, values: `FalconModel.modify_tensors` of convert_hf_to_gguf.py. The result has a part for each head.
    """
    (whole,), (many, few) = source.parts, heads
    group = many // few + 2 if few else 0
    count = few * group
    if not count or many % few or whole.shape[0] % count:
        return source
    rows = whole.shape[0] // count
    size = len(whole.raw) // count
    cut = [Stored(whole.raw[i * size : (i + 1) * size], whole.dtype, (rows, *whole.shape[1:])) for i in range(count)]
    places = [i for i in range(count) if i % group < group - 2]
    places += [*range(group - 2, count, group), *range(group - 1, count, group)]
    if len(whole.shape) == 1:  # a bias
        together = Stored(np.concatenate([cut[i].raw for i in places]), whole.dtype, whole.shape)
        return TensorSource((together,), source.names, source)
    return TensorSource(tuple(cut[i] for i in places), source.names, source)


def shaped(source: TensorSource, shape: tuple[int, ...]) -> TensorSource:
    """A tensor in the GGUF's shape if the two differ only in dimensions of 1: the kernels of convolutions, [n, 1, k] in PyTorch."""
    part = source.parts[0]
    if len(source.parts) > 1 or part.shape == shape or [n for n in part.shape if n > 1] != [n for n in shape if n > 1]:
        return source
    return replace(source, parts=(Stored(part.raw, part.dtype, shape),))
