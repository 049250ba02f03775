"""Recomputes every node of llama.cpp's graphs from the node's own operands, inside the eval callback.

Run as a program it does so in a process of its own, since ggml aborts on its asserts:  python -P node_by_node.py MODEL IDS STEPS NATIVE
prints one JSON object, operation -> how many nodes, the worst NMSE and its node.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.ggml_ops import VIEWS, OpParams, operation
from engine.replay import products
from engine.replay.products import QuantizedWeight
from engine.weights.dequantize import dequantize
from engine.weights.rounding import F32
from reference import session as sessions
from reference.ggml import COMPUTED, Ggml, GgmlTensor
from reference.library import Library
from reference.model import Model

_ORDERS = ("ARGSORT", "TOP_K", "ARGMAX")  # their result is places: what stands there is compared
_EMPTY = 1e-30


@dataclass
class Worst:
    """The nodes of one operation: how many there were, and the one that differs most."""

    count: int = 0
    nmse: float = 0.0
    node: str = ""
    error: str = ""

    def note(self, node: str, nmse: float) -> None:
        """Count a node."""
        self.count += 1
        if not nmse <= self.nmse:
            self.nmse, self.node = nmse, node


class Recomputing:
    """A `reference.callback.Tap` that recomputes every node that it sees."""

    def __init__(self, ggml: Ggml) -> None:
        self.ggml = ggml
        self.worst: dict[str, Worst] = {}
        self.stop = False
        self._operands: list[Any] | None = None
        self._kinds: list[int] = []
        self._weights: dict[int, Any] = {}

    def check(self) -> None:
        """Raise nothing: failures are results."""

    def __call__(self, address: int, ask: bool, _data: int | None) -> bool:
        """Copy a node's operands before it is computed, compute it once more afterwards."""
        try:
            tensor = self.ggml.tensor(address)
            if ask:
                self._ask(tensor)
            elif self._operands is not None:
                self._compare(tensor)
        except Exception as error:
            name = self.ggml.op_name(self.ggml.tensor(address).op)
            worst = self.worst.setdefault(name, Worst())
            worst.error = worst.error or f"{type(error).__name__}: {error}"
            worst.count += 1
            self._operands = None
        return True

    def _ask(self, tensor: GgmlTensor) -> None:
        self._operands = None
        if self.ggml.op_name(tensor.op) in VIEWS or not tensor.flags & COMPUTED:
            return
        sources = [tensor.src[index].contents if tensor.src[index] else None for index in range(10)]
        while sources and sources[-1] is None:
            sources.pop()
        self._kinds = [0 if source is None else source.type for source in sources]
        self._operands = [None if source is None else self._read(source) for source in sources]

    def _read(self, tensor: GgmlTensor) -> Any:
        kind = self.ggml.type_name(tensor.type)
        whole = tensor.data is not None and not tensor.view_src and not tensor.op
        if kind in ("f16", "bf16") and whole and tensor.ne[2] > 1:  # experts
            kind = "blocks"
        if self.ggml.readable(kind) and kind != "i32":
            return self.ggml.read(tensor)
        shape = tuple(tensor.ne)[::-1]
        if kind in ("i32", "i64"):
            item = np.dtype({"i32": np.int32, "i64": np.int64}[kind])
            extent = item.itemsize + sum((n - 1) * stride for n, stride in zip(tensor.ne, tensor.nb, strict=True))
            return np.ndarray(shape, item, self._bytes(tensor, extent), 0, tuple(tensor.nb)[::-1]).copy()
        if tensor.data not in self._weights:
            row = self.ggml.row_size(tensor.type, tensor.ne[0])
            rows = int(np.prod(shape[:-1]))
            self._weights[tensor.data] = QuantizedWeight(self._bytes(tensor, row * rows).reshape(rows, row), tensor.type, shape)
        return self._weights[tensor.data]

    def _bytes(self, tensor: GgmlTensor, count: int) -> Any:
        raw = np.empty(count, np.uint8)
        self.ggml._read(ctypes.byref(tensor), raw.ctypes.data, 0, count)
        return raw

    def _compare(self, tensor: GgmlTensor) -> None:
        name, node = self.ggml.op_name(tensor.op), tensor.name.decode(errors="replace")
        kind = self.ggml.type_name(tensor.type)
        reference = self._read(tensor)
        operands, self._operands = self._operands or [], None
        params = OpParams(tuple(tensor.op_params), kind)
        with np.errstate(all="ignore"):
            ours = self._computed(name, node, operands, params, reference.shape)
        if ours.shape != reference.shape:
            raise ValueError(f"{ours.shape} for {reference.shape} at {node}")
        if name in _ORDERS:
            ours, reference = (np.take_along_axis(operands[0], places.astype(np.int64), -1) for places in (ours, reference))
        self.worst.setdefault(name, Worst()).note(node, nmse(ours, reference, _typical_size(name, operands, reference)))

    def _computed(self, name: str, node: str, operands: list[Any], params: OpParams, shape: Any) -> Any:
        if name == "MUL_MAT" and self._kinds[0] != F32:
            return products.mul_mat(*operands, params=params, shape=shape, native=True, kind=self._kinds[0])
        if name == "MUL_MAT_ID" and self._kinds[0] != F32:
            return products.mul_mat_id(*operands, params=params, shape=shape, native=True)
        given = [_values(operand) if isinstance(operand, QuantizedWeight) else operand for operand in operands]
        return operation(name, node)(*given, params=params, shape=shape)


def _values(weight: QuantizedWeight) -> Any:
    return dequantize(weight.raw, weight.kind, weight.columns).reshape(weight.shape)


def _typical_size(name: str, operands: Sequence[Any], reference: Any) -> float:
    """The square of a product's typical size, where a few sums of K terms may all have cancelled: Σ over outputs of Σ(w·x)².

    It is what Σb² of a product would be on the average if its terms had random signs; 0 for what is no product.
    """
    given = [_values(operand) if isinstance(operand, QuantizedWeight) else operand for operand in operands]
    if name == "MUL_MAT" and given[0].shape[:2] == (1, 1):
        weight, x = (np.asarray(operand, np.float64) ** 2 for operand in given)
        return float(np.sum(x @ weight[0, 0].T))
    if name == "LIGHTNING_INDEXER":
        q, k, weights = (np.asarray(operand, np.float64) ** 2 for operand in given[:3])
        scores = q @ k[:, None, :, 0, :].swapaxes(-1, -2)
        return float(np.sum((weights[:, 0, :, None, :] @ scores)[:, None, :, 0][np.isfinite(reference)]))
    return 0.0


def nmse(ours: Any, reference: Any, least: float = 0.0) -> float:
    """Σ(a − b)² / max(Σb², least) over the reference's finite elements; infinite if other elements are finite in ours."""
    with np.errstate(all="ignore"):
        ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
        finite = np.isfinite(reference)
        if not np.array_equal(np.isfinite(ours), finite):
            return float("inf")
        if not np.array_equal(ours[~finite], reference[~finite], equal_nan=True):
            return float("inf")
        apart = float(np.sum((ours[finite] - reference[finite]) ** 2))
        return apart / max(float(np.sum(reference[finite] ** 2)), least, _EMPTY)


def recompute(model: Path, tokens: Sequence[int], steps: int) -> dict[str, Worst]:
    """Every node of the prompt's pass and of `steps` decode steps, in this process."""
    sessions.Tap = Recomputing  # type: ignore[assignment,misc]
    library = Library()
    with Model(library, model) as loaded:
        room = len(tokens) + steps
        with sessions.Session(loaded, n_ctx=max(64, room), n_batch=max(64, room)) as session:
            api, context = library.api, session._context
            tap: Any = session.tap
            if api.llama_model_has_encoder(loaded.handle):
                _encode(session, tokens)
                if not api.llama_model_has_decoder(loaded.handle):
                    return tap.worst
                tokens = tokens[:2]
            api.llama_set_embeddings(context, bool(api.llama_pooling_type(context) > 0))
            status = session._decode(tokens, 0)
            for step in range(steps if status == 0 else 0):
                status = status or session._decode([tokens[step % len(tokens)]], len(tokens) + step)
            if status:
                tap.worst["decode"] = Worst(1, float("inf"), "", f"status {status}")
            return tap.worst


def _encode(session: Any, tokens: Sequence[int]) -> None:
    api = session.model.library.api
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, place, 1, 1
        batch.seq_id[place][0] = 0
    api.llama_encode(session._context, batch)
    api.llama_batch_free(batch)


def measured(model: Path, tokens: Sequence[int], steps: int = 2) -> dict[str, Worst]:
    """The same in a process of its own.

    Raises:
        RuntimeError: the process failed; the message has the last lines of its output.
    """
    words = [sys.executable, "-P", __file__, str(model), ",".join(map(str, tokens)), str(steps)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"exit {ran.returncode}: {(ran.stderr or ran.stdout)[-400:]}")
    return {name: Worst(**worst) for name, worst in json.loads(ran.stdout.splitlines()[-1]).items()}


if __name__ == "__main__":
    nodes = recompute(Path(sys.argv[1]), [int(word) for word in sys.argv[2].split(",")], int(sys.argv[3]))
    print(json.dumps({name: asdict(worst) for name, worst in nodes.items()}))
