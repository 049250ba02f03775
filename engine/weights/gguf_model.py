"""GGUF -> hyperparameters and named weights."""

import mmap
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.errors import ModelError
from checkpoints.gguf_file import Contents, contents
from checkpoints.gguf_values import ARRAY
from checkpoints.record import ModelInfo

from .dequantize import FORMATS, dequantize, dequantize_into

_LEAST_ROPE = 1e-30  # least base or factor: below it, the angles of some hundred million positions are beyond float32
_LONGEST_NAME = 64  # characters of an architecture: llama.cpp's longest has 16
# The usual values of llama.h's llama_ftype: importing gguf, which has them all, takes longer than opening a small model.
# fmt: off
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S",
    22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS",
    31: "IQ1_M", 32: "BF16",
}
# fmt: on


class TensorInfo(Struct, frozen=True):
    """Where a tensor lies. `shape` is row-major, (out, in) for a matrix; `offset` counts from the start of the file.

    `part` is the index of that file among a split model's.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    n_bytes: int
    offset: int
    part: int = 0


class Hyperparameters(Struct, frozen=True):
    """What the metadata say of a model, in the field's terms.

    `rope_scale` multiplies the position (1 / factor of linear scaling), `value_size` is the width of one value head; a number that
    differs from layer to layer is the largest of them. `irregular` names a feature that no list of steps written by hand has ("" if
    there is none): such a model is computed from llama.cpp's graph.
    """

    architecture: str
    name: str
    file_type: str
    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    value_size: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    eps: float
    rope_base: float
    rope_dims: int
    rope_scale: float
    irregular: str = ""


_KINDS = {str: "a text", int: "a whole number", float: "a number"}


class GgufModel:
    """A model file, or the files of a split model, memory-mapped: weights are read only when needed.

    Raises:
        ModelError: the file cannot be read, or its metadata lack what an engine must know or contradict it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._irregular = ""
        self._contents = contents(path)
        self.metadata = {key: value.plain() for key, value in self._contents.metadata.items() if value.type != ARRAY}
        self.tensors = _tensors(self._contents)
        self._data = [_mapped(part.path) for part in self._contents.parts]
        self.hyperparameters = self._hyperparameters()

    @property
    def contents(self) -> Contents:
        """The file's table of contents."""
        return self._contents

    @property
    def fingerprint(self) -> str:
        """`checkpoints.fingerprint.fingerprint` of the file."""
        return self._contents.fingerprint

    @property
    def info(self) -> ModelInfo:
        """How a dump describes this model.

        Raises:
            ModelError: the file cannot be read to its end.
        """
        return self._contents.info(self.hyperparameters.file_type)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, one row of the weight per row: uint8 [rows, bytes per row], a view of the memory map."""
        info = self.tensors[name]
        return np.frombuffer(self._data[info.part], np.uint8, info.n_bytes, info.offset).reshape(prod(info.shape[:-1]), -1)

    def array(self, key: str) -> list[Any]:
        """The elements of an array of the metadata; empty if there is no such array."""
        value = self._contents.metadata.get(key)
        return list(value.plain()) if value is not None and value.type == ARRAY else []

    def load(self, name: str) -> NDArray[np.float32]:
        """A whole tensor as float32, row-major."""
        info = self.tensors[name]
        out = np.empty((prod(info.shape[:-1]), info.shape[-1]), dtype=np.float32)
        dequantize_into(out, self.raw(name), info.type)
        return out.reshape(info.shape)

    def load_matrix(self, name: str, number: int) -> NDArray[np.float32]:
        """One matrix of a tensor [.., out, in] as float32 [out, in]; `number` counts over the leading dimensions."""
        info = self.tensors[name]
        rows, columns = info.shape[-2:]
        out = np.empty((rows, columns), dtype=np.float32)
        dequantize_into(out, self.raw(name)[number * rows : (number + 1) * rows], info.type)
        return out

    def load_rows(self, name: str, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of a matrix as float32 [len(ids), columns]; only those are dequantised."""
        info = self.tensors[name]
        rows: NDArray[np.float32] = dequantize(self.raw(name)[ids], info.type, info.shape[-1])
        return rows

    def _hyperparameters(self) -> Hyperparameters:
        get = self._get
        architecture = get("general.architecture", str)
        if not architecture:
            raise self._wrong("general.architecture is empty")
        if len(architecture) > _LONGEST_NAME:
            raise self._wrong(f"general.architecture has {len(architecture):,} characters")
        if not self.tensors:
            raise ModelError(
                f"{self.path} has a tokenizer but no tensors: it can tokenize, not compute.",
                "Use a model file with weights.",
                code="no-tensors",
            )

        def own(key: str, kind: type, default: Any = None) -> Any:
            return get(f"{architecture}.{key}", kind, default)

        n_embd, n_heads = own("embedding_length", int), self._uniform(f"{architecture}.attention.head_count")
        n_kv_heads = self._uniform(f"{architecture}.attention.head_count_kv", n_heads)
        if own("block_count", int) < 1:
            raise self._wrong("it has no layers")
        rope_base = own("rope.freq_base", float, 10000.0)
        if not (isfinite(rope_base) and rope_base >= _LEAST_ROPE):
            raise self._wrong(f"a RoPE base of {rope_base} is not usable")
        if n_embd < 1:
            raise self._wrong(f"a width of {n_embd} is impossible")
        if min(n_heads, n_kv_heads) < 1 or n_heads % n_kv_heads:
            self._beyond(f"width {n_embd}, {n_heads} heads and {n_kv_heads} key/value heads do not fit together")
        elif f"{architecture}.attention.key_length" not in self.metadata and n_embd % n_heads:
            self._beyond(f"width {n_embd} and {n_heads} heads do not fit together")
        head_size = own("attention.key_length", int, n_embd // max(n_heads, 1))
        rope_dims = own("rope.dimension_count", int, head_size)
        if not 0 < rope_dims <= head_size or rope_dims % 2:
            self._beyond(f"{rope_dims} rotary dimensions do not fit a head of {head_size}")
        if f"{architecture}.expert_count" in self.metadata:
            self._beyond("it is a mixture of experts")
        embedding = self.tensors.get("token_embd.weight")
        return Hyperparameters(
            architecture=architecture,
            name=get("general.name", str, ""),
            file_type=self._file_type(),
            n_layers=own("block_count", int) * max(own("num_loops", int, 1), 1),
            n_embd=n_embd,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_size=head_size,
            value_size=own("attention.value_length", int, head_size),
            n_ff=self._uniform(f"{architecture}.feed_forward_length", 0),
            n_vocab=embedding.shape[0] if embedding else own("vocab_size", int, 0),
            n_ctx_train=own("context_length", int),
            eps=own("attention.layer_norm_rms_epsilon", float, 0.0),
            rope_base=rope_base,
            rope_dims=rope_dims,
            rope_scale=self._rope_scale(architecture),
            irregular=self._irregular,
        )

    def _beyond(self, request: str) -> None:
        """Note a feature that no hand-written list has; the first one suffices."""
        self._irregular = self._irregular or request

    def _wrong(self, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {problem}.", "The metadata are damaged or made by hand: convert it again.")

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise self._wrong(f"the metadata have no {key}")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._wrong(f"{key} is {value!r:.60}, which is not {_KINDS[kind]}")
        return value

    def _uniform(self, key: str, default: int | None = None) -> int:
        """A number that some files give once per layer: it must be the same in all layers."""
        value = self.metadata.get(key, default)
        if listed := self.array(key):
            different = set(listed)
            if not all(isinstance(number, int) and not isinstance(number, bool) for number in different):
                raise self._wrong(f"{key} contains something other than whole numbers")
            if len(different) != 1:
                self._beyond(f"{key} differs from layer to layer")
            value = max(different)
        if value is None:
            raise self._wrong(f"the metadata have no {key}")
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(f"{key} is {value!r:.60}, which is not a whole number")
        return value

    def _rope_scale(self, architecture: str) -> float:
        """The factor of positions. Mirrors llama_model::load_hparams: scaling without a stated type is linear."""
        kind = self._get(f"{architecture}.rope.scaling.type", str, "linear")
        factor = self._get(f"{architecture}.rope.scaling.factor", float, 0.0)
        factor = factor or self._get(f"{architecture}.rope.scale_linear", float, 0.0)
        if kind not in ("none", "linear"):
            self._beyond(f"it scales RoPE by {kind!r}")
        if 0 < factor < _LEAST_ROPE:
            raise self._wrong(f"a RoPE factor of {factor} is not usable")
        return 1.0 / factor if kind == "linear" and factor > 0 else 1.0

    def _file_type(self) -> str:
        number = self.metadata.get("general.file_type")
        if number in FILE_TYPES:
            return FILE_TYPES[number]
        from gguf import LlamaFileType

        try:
            return str(LlamaFileType(number).name.removeprefix("MOSTLY_"))
        except ValueError:
            return ""


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _tensors(contents: Contents) -> dict[str, TensorInfo]:
    """Every tensor with its shape and size, checked against its type's blocks, the tensor before it and the file's end.

    Mirrors gguf_init_from_file_impl: one tensor begins where the last one ends, padded to the file's alignment.
    """
    tensors: dict[str, TensorInfo] = {}
    ends = [0] * len(contents.parts)
    for tensor in contents.tensors:
        block, size = block_of(tensor.type, tensor.name)
        shape, file = tuple(reversed(tensor.ne)), contents.parts[tensor.part]
        if min(shape) < 1 or shape[-1] % block:
            raise _damaged(file, f"tensor {tensor.name} of shape {list(shape)} does not fit its type's blocks of {block}")
        if tensor.offset != ends[tensor.part]:
            begins = f"tensor {tensor.name} begins at byte {tensor.offset:,} of the data"
            raise _damaged(file, f"{begins}, but the tensors before it end at byte {ends[tensor.part]:,}")
        n_bytes, offset = prod(shape) // block * size, file.data + tensor.offset
        if offset + n_bytes > file.size:
            raise ModelError(
                f"{file.path} is cut short: tensor {tensor.name} ends at byte {offset + n_bytes:,}, the file at {file.size:,}.",
                "Download it again.",
                code="damaged-model",
            )
        ends[tensor.part] = -(-(tensor.offset + n_bytes) // file.alignment) * file.alignment
        tensors[tensor.name] = TensorInfo(tensor.name, shape, tensor.type, n_bytes, offset, tensor.part)
    return tensors


def _damaged(file: Contents, problem: str) -> ModelError:
    return ModelError(f"{file.path} is damaged: {problem}.", "Download it again.", code="damaged-model")


def block_of(kind: int, name: str = "") -> tuple[int, int]:
    """Elements and bytes of one block of a ggml type.

    Raises:
        ModelError: gguf-py does not know the type.
    """
    if kind in FORMATS:  # importing gguf takes longer than opening a small model
        return FORMATS[kind][:2]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block: tuple[int, int] = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        advice = "A newer gguf package may know it: pip install -U gguf."
        raise ModelError(f"tensor {name} has the unknown type {kind}.", advice, code="type") from None
    return block
