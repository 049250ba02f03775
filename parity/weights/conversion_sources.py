"""Where each tensor of a GGUF comes from in a Hugging Face folder: names, stacked experts, and what converters make of a tensor."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.errors import InputError

from .conversion_forms import ConvertedForm, ConvertedModel, forms, matrices
from .folder_quantisation import SCALE
from .packed import Floats
from .safetensors_folder import Folder
from .stored import Stored

if TYPE_CHECKING:
    from gguf import TensorNameMap

_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)(\.(?:weight|scale|input_scale))")
_ONE = 1e-6  # converters take a scale as near as this for 1
_SUFFIXES = (".weight", ".bias", ".scale", ".input_scale")
_STACKED = re.compile(r"(.*\.altup_(?:\w+_)?projections|.*\.[qk]_layernorm)(?:\.norms)?\.(\d+)\.weight")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class TensorSource(Struct, frozen=True):
    """Where a tensor of the GGUF comes from: parts one after the other, and under `mistakes` what usual errors would have made."""

    parts: tuple[Stored, ...]
    mistakes: tuple[tuple[str, tuple[Stored, ...]], ...] = ()

    @property
    def readable(self) -> bool:
        """Whether the values of all parts are known."""
        return all(part.readable for part in self.parts)

    @property
    def size(self) -> int:
        """The number of values."""
        return sum(part.array.size for part in self.parts)

    @property
    def needless(self) -> bool:
        """Whether these are scales that converters leave out: `_write_scale_tensor` of conversion/base.py."""
        return all(part.kind == SCALE and abs(float(part.array[0]) - 1) < _ONE for part in self.parts)

    def shaped(self, shape: tuple[int, ...]) -> "TensorSource":
        """With parts that have the rows of a GGUF tensor of that shape, where their number of values allows it."""
        columns = shape[-1]
        if len(shape) == 1 and len(self.parts) + self.parts[0].array.ndim > 2:
            row = np.concatenate([part.part().reshape(-1) for part in self.parts])[None]
            return replace(self, parts=(Stored(row),))
        return replace(self, parts=tuple(piece for part in self.parts for piece in matrices(part, columns)))

    def turned(self) -> "TensorSource":
        """Each part transposed."""
        return replace(self, parts=tuple(part.view(part.array.T) for part in self.parts))

    def portions(self, columns: int, most: int, unit: int) -> Iterator[tuple[int, Floats]]:
        """(first row, values [rows, columns]) of at most about `most` values at a time, whole multiples of `unit` rows.

        Nothing where a part has rows of another length.
        """
        if any(int(np.prod(part.shape[1:])) != columns for part in self.parts):
            return
        step = max(unit, most // columns // unit * unit)
        begin = 0
        for part in self.parts:
            for start in range(0, len(part.array), step):
                rows = part.part(slice(start, start + step))
                yield begin + start, np.ascontiguousarray(rows).reshape(len(rows), columns)
            begin += len(part.array)


def sources_of(model: ConvertedModel, layers: int, folder: Folder) -> tuple[dict[str, TensorSource], list[str]]:
    """The source of each GGUF tensor by its name, and the folder's tensors from which none is made."""
    import gguf

    arch = model.architecture
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    if kind is None:
        raise InputError(f"gguf-py has no names of the architecture {arch}.", "Conversion cannot be checked for it.")
    names = gguf.get_tensor_name_map(kind, layers)
    sources: dict[str, TensorSource] = {}
    stacks: dict[str, dict[int, str]] = {}
    stray: list[str] = []
    for name, stored in folder.tensors.items():
        if match := _EXPERT.fullmatch(name):
            head = match[1].replace("block_sparse_moe", "mlp")
            stacks.setdefault(f"{head}.experts.{_MIXTRAL.get(match[3], match[3])}{match[4]}", {})[int(match[2])] = name
            continue
        if match := _STACKED.fullmatch(name):
            stacks.setdefault(match[1].replace("model.language_model.", "model.") + ".weight", {})[int(match[2])] = name
            continue
        to = _named(name, names, model.held)
        converted = forms(name, to, stored, model) or ({to: ConvertedForm((stored,))} if to else {})
        if converted:
            sources |= {key: TensorSource(form.parts, form.mistakes) for key, form in converted.items()}
        elif stored.readable:
            stray.append(name)
    for joined, members in stacks.items():
        to = _named(joined, names, model.held)
        if not to or sorted(members) != list(range(len(members))):
            stray += members.values()
            continue
        sources[to] = TensorSource(tuple(folder.tensors[members[number]] for number in range(len(members))))
    return {name: source for name, source in sources.items() if not source.needless}, stray


def _named(name: str, names: "TensorNameMap", held: frozenset[str]) -> str:
    """The GGUF name of a tensor, "" if it has none; of those with and without a suffix the one that the GGUF has."""
    plain = name.replace("model.language_model.", "model.").replace(".qweight", ".weight")
    # As the converters of BLOOM and Mamba 2 change them.
    spellings = (plain, plain.removeprefix("transformer."), plain.replace(".dt_bias", ".dt_proj.bias"))
    to = next(filter(None, (names.get_name(text, try_suffixes=_SUFFIXES) for text in spellings)), "") or ""
    return to if to in held else next((to + suffix for suffix in (".weight", ".bias") if to + suffix in held), to)
