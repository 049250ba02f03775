"""What lint needs from a model file (`--model`)."""

from collections.abc import Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

if TYPE_CHECKING:  # a comparison lints without a model and must not import the engine for nothing
    from engine.weights.gguf_model import GgufModel, Hyperparameters

_SAMPLED = 16  # rows of a matrix that are looked at
_BLOCK = 8192  # embedding rows that are dequantised at once: 29 MiB at a width of 896


class ModelFacts(Struct, frozen=True, dict=True):
    """Hyperparameters, and the few weights that lint compares with.

    Raises (on construction with `open_model`):
        ModelError: the file cannot be read as a model.
    """

    model: "GgufModel"
    _flat: dict[int | None, bool] = field(default_factory=dict)

    @property
    def hp(self) -> "Hyperparameters":
        """The model's hyperparameters."""
        return self.model.hyperparameters

    @cached_property
    def alike(self) -> bool:
        """Whether all layers are alike, in an architecture with plain heads and one feed-forward."""
        from engine.models import written_by_hand

        return written_by_hand(self.hp, self.model.tensors)

    @property
    def window(self) -> int | None:
        """How many positions attention sees in the layers that have a window; None if the metadata state none."""
        return self.model.contents.attention_window

    @property
    def several_streams(self) -> bool:
        """Whether layers pass on several hidden states of a token, by an AltUp projection or hyper-connections."""
        count = self.model.metadata.get(f"{self.hp.architecture}.hyper_connection.count", 1)
        return "altup_proj.weight" in self.model.tensors or (isinstance(count, int) and count > 1)

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return self.hp.n_layers

    def embeddings(self, ids: Sequence[int], width: int) -> NDArray[np.float32]:
        """The leading `width` values of embedding rows: float32 [len(ids), width]."""
        rows = self.model.load_rows("token_embd.weight", np.asarray(ids, dtype=np.int64))
        leading: NDArray[np.float32] = rows[:, :width]
        return leading

    def nearest_token(self, row: NDArray[np.float32]) -> tuple[int, float]:
        """The token whose embedding has the most similar direction to `row` (leading values), with the cosine."""
        best, cosine = -1, -1.0
        wide = row.astype(np.float64)
        for start in range(0, self.hp.n_vocab, _BLOCK):
            stop = min(start + _BLOCK, self.hp.n_vocab)
            block = self.embeddings(range(start, stop), len(row)).astype(np.float64)
            norms = np.linalg.norm(block, axis=1) * np.linalg.norm(wide)
            cosines = np.divide(block @ wide, norms, out=np.zeros(len(block)), where=norms > 0)
            at = int(cosines.argmax())
            if cosines[at] > cosine:
                best, cosine = start + at, float(cosines[at])
        return best, cosine

    def rows(self, name: str) -> int:
        """The number of rows of a matrix, 0 if the model has none of that name."""
        info = self.model.tensors.get(name)
        return info.shape[0] if info is not None else 0

    def has_flat_weights(self, layer: int | None) -> bool:
        """Whether a matrix of a layer (None: of none) has rows of one repeated number, or a norm's weights are all 0.

        Layers that were added to a trained model begin so: their outputs are zero, and nothing is added. Some rows of each are looked at.
        """
        if layer not in self._flat:
            begins = f"blk.{layer}."
            names = [
                name for name in self.model.tensors if (name.startswith(begins) if layer is not None else "blk." not in name)
            ]
            self._flat[layer] = any(self._is_flat(name) for name in names)
        return self._flat[layer]

    def _is_flat(self, name: str) -> bool:
        shape = self.model.tensors[name].shape
        if not name.endswith(".weight") or shape[-1] < 2:
            return False
        if len(shape) == 1:
            return not self.model.load(name).any()
        rows = self.model.load_rows(name, np.unique(np.linspace(0, prod(shape[:-1]) - 1, _SAMPLED).astype(np.int64)))
        flat = (rows == rows[:, :1]).all(axis=1)
        return bool(flat.any() if name.startswith("blk.") else flat.all())  # ids that were never used have flat rows

    def output_norm(self) -> NDArray[np.float32] | None:
        """The final norm's weights [D]; None if the model has another name for them."""
        return self.model.load("output_norm.weight") if "output_norm.weight" in self.model.tensors else None


def open_model(path: Path) -> ModelFacts:
    """Open a model file for lint. Raises ModelError."""
    from engine.weights.gguf_model import GgufModel

    return ModelFacts(GgufModel(path))
