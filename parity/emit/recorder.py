"""The tap for Python engines. `parity emit python` prints this file together with the definitions that it uses."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.lines import checkpoint_lines, end_line, header_line, token_line
from checkpoints.points import in_layer, parse, resolve
from checkpoints.reading.words import compute
from checkpoints.record import DEFAULT_SLICE, Header, ModelInfo, Token
from checkpoints.summary import summarise

from .cuda_driver import is_captured
from .graphs import Graphs
from .head_rows import HeadRows
from .injected import to_inject


def to_host(value: Any) -> NDArray[np.float32]:
    """A copy in host memory, float32: of a NumPy, CuPy, PyTorch or JAX array, or of anything with DLPack.

    Raises:
        TypeError: it is not an array, or one of complex numbers, of which a half would be lost.
    """
    if "complex" in str(getattr(value, "dtype", "")):
        raise TypeError("a checkpoint is made of real numbers; this array is complex")
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # PyTorch: waits for the stream that computes it
        value = value.detach().float().cpu().numpy()
    elif hasattr(value, "__cuda_array_interface__") and hasattr(value, "get"):  # CuPy
        value = value.get()
    elif not isinstance(value, np.ndarray):
        if hasattr(value, "__array__"):  # JAX and others
            value = np.asarray(value)
        elif hasattr(value, "__dlpack__"):
            value = np.from_dlpack(value)
        else:
            raise TypeError(f"a checkpoint is made of an array, not of {type(value).__name__}")
    return np.array(value, dtype=np.float32, order="C", copy=True)


def _arithmetic(word: str) -> str:
    """The arithmetic that a word names, as the format spells it.

    Raises:
        ValueError: no reader of dumps knows it: better said before the engine runs than when its dump is read.
    """
    return compute(word)


def _like(value: Any, host: "NDArray[np.float32]") -> Any:
    """An array in host memory as one of the same kind, type and device as `value`."""
    if hasattr(value, "detach") and hasattr(value, "new_tensor"):  # PyTorch
        return value.new_tensor(host)
    if hasattr(value, "__cuda_array_interface__") and hasattr(value, "get"):  # CuPy
        copy = value.copy()
        copy.set(host.astype(value.dtype).reshape(value.shape))
        return copy
    if isinstance(value, np.ndarray):
        return host.astype(value.dtype).reshape(value.shape)
    return host.reshape(value.shape)


def _as_json(value: Any) -> Any:
    """float32 with the fewest digits that reproduce it."""
    if isinstance(value, np.ndarray):
        return [float(str(x)) for x in value]
    if isinstance(value, np.floating):
        return float(str(value))
    if isinstance(value, np.integer):
        return int(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


_WITH_POST_NORMS = {
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_post_norm",
}


def _point_of(module: str, modules: "Mapping[str, Any]", layers: "int | None") -> "str | None":
    """The point that a module of a PyTorch model makes, by its Hugging Face name; None if that is not known.

    In layers that normalise what a branch adds (Gemma 2, OLMo 2) `post_attention_layernorm` is that norm, elsewhere the one before the
    feed-forward.
    """
    layer, _, last = module.rpartition(".")
    number = parse(resolve(layer, layers)).layer
    if number is not None and last in _WITH_POST_NORMS and f"{layer}.post_feedforward_layernorm" in modules:
        return in_layer(number, _WITH_POST_NORMS[last])
    point = resolve(module, layers)
    return point if parse(point).known is not None else None


class Recorder:
    """Writes checkpoints: `with Recorder("ours.jsonl", compute="f32", model="my-model", tokens=ids) as tap: tap("blk.5.l_out", hidden)`.

    `compute` is the arithmetic of your products ("f32", "tf32", "f16", "bf16", "q8"): the limits of the comparison follow from it.
    `points` are the names to record, with commas, as {points} of `parity run --exec` gives them; "" records all. Names may have
    wildcards ("blk.*.q"). `positions` are those to record, None for all.

    In a stream that is being captured into a CUDA graph (`torch.cuda.graph`, CuPy's `begin_capture`) a call becomes part of the graph
    and records at every replay; `positions_from` says where replays read their position. A replay is written when the engine is idle,
    and by `flush` and `close`. Where several graphs record one point in turns, its `step` counts in the order in which their replays were
    brought to the host, which may be several of one graph and then several of another; positions are the graph's own.

    A value is copied in the call. The rows of a point take the positions after those already recorded for it, so that
    a prefill [T, n] and decode steps [1, n] number themselves; give `positions` if some are left out.

    Raises:
        OSError: the file cannot be written.
        ValueError: `compute` is no arithmetic that is known.
    """

    def __init__(
        self,
        path: "str | os.PathLike[str]",
        *,
        compute: str,
        model: str = "",
        tokens: Sequence[int] = (),
        prompt: "str | None" = None,
        layers: "int | None" = None,
        source: str = "python",
        points: str = "",
        positions: "Sequence[int] | None" = None,
        slice_size: int = DEFAULT_SLICE,
        hparams: "Mapping[str, Any] | None" = None,
    ) -> None:
        arithmetic = _arithmetic(compute)
        self.layers = layers
        listed = [name for name in points.split(",") if name]
        self._globs = tuple(name for name in listed if any(sign in name for sign in "*?["))
        self._only = frozenset(resolve(name, layers) for name in listed if name not in self._globs)
        self._positions = None if positions is None else frozenset(positions)
        self.slice_size = slice_size
        self.checkpoints = 0
        self.tokens = 0
        self._next: dict[tuple[str, int], int] = {}
        self._passes: dict[tuple[str, int], int] = {}
        self._given = to_inject(os.environ.get("PARITY_INJECT", ""))
        self._injected: dict[str, int] = {}
        self._lock = threading.RLock()
        self._place: Any = None
        self._head_rows = HeadRows(hparams, len(tokens))
        self._graphs = Graphs(self._take)
        self._file = open(path, "wb")  # noqa: SIM115, PTH123  # closed by close
        self._write(
            header_line(
                Header(
                    source=source,
                    model=ModelInfo(name=model, layers=layers),
                    tokens=tuple(int(token) for token in tokens),
                    prompt=prompt,
                    compute=arithmetic,
                    slice=slice_size,
                    hparams=dict(hparams) if hparams else None,
                )
            )
        )

    def __call__(self, name: str, value: Any, positions: "Sequence[int] | None" = None, seq: int = 0) -> None:
        """Record a value: [T, n] or [n]; [B, T, n] are B sequences. Attention scores and weights are [H, T, S] or [B, H, T, S].

        Queries, keys, values and norms of them may have their heads as a dimension of their own, before or behind the positions: which
        it is follows from `hparams` ("heads", "kv_heads", "head_size"), from other points of the pass, or from the tokens.

        `seq` is the number of the (first) sequence, where prompts of unequal length are computed together: a call for each prompt's rows.

        Raises:
            TypeError, ValueError: it is not an array, its number of rows is not that of the positions, or nothing says which of its
                dimensions is which.
            RuntimeError: its stream is being captured into a graph, but the checkpoint cannot be.
        """
        point = resolve(name, self.layers)
        with self._lock:
            self._head_rows.see(point, getattr(value, "shape", None), seq)
        if not self._wants(point):
            return
        if not is_captured(value):
            with self._lock:
                array = self._head_rows.arranged(point, to_host(value), None if positions is None else len(positions), seq)
                self._split(point, array, positions, seq)
        elif seq:
            raise ValueError(f"{point}: a captured graph records sequence 0 only")
        elif positions is not None:
            raise ValueError(f"{point}: a captured graph reads its positions from device memory; see positions_from")
        else:
            rows = int(np.prod(tuple(getattr(self._place, "shape", ()))))
            with self._lock:
                value = self._head_rows.arranged(point, value, rows if rows > 1 else None)
            self._graphs.add(point, value, self._place)

    def positions_from(self, array: Any) -> None:
        """Set the device array, int32 or int64, from which replays read the positions of their rows, at the first checkpoint of a pass.

        It has a position for each row, or only the first one. You keep it up to date, in the graph or by a copy before each replay.
        """
        self._place = array

    def flush(self) -> None:
        """Write the values of the last replay of each captured graph; waits for the device."""
        self._graphs.flush()

    def _take(self, point: str, array: NDArray[np.float32], positions: "Sequence[int] | None" = None, first: int = 0) -> None:
        with self._lock:
            self._split(point, array, positions, first)

    def _split(self, point: str, array: NDArray[np.float32], positions: "Sequence[int] | None", first: int) -> None:
        """Record a value's sequences, numbered from `first`."""
        known = parse(point).known
        if known is not None and known.row == ("H", "t+1"):
            for seq, rows in enumerate(array if array.ndim == 4 else array[None], first):
                self._record(point, rows, rows.shape[1], seq, positions)
        elif array.ndim in (3, 4):  # of a point that is not known, a row may have two dimensions
            width = int(np.prod(array.shape[2:]))  # not -1: there may be no rows
            for seq, rows in enumerate(array.reshape(*array.shape[:2], width), first):
                self._record(point, rows, len(rows), seq, positions)
        else:
            self._record(point, np.atleast_2d(array), 1 if array.ndim < 2 else len(array), first, positions)

    def _wants(self, point: str) -> bool:
        if not self._only and not self._globs:
            return True
        return point in self._only or any(fnmatchcase(point, name) for name in self._globs)

    def _record(self, point: str, array: NDArray[np.float32], rows: int, seq: int, positions: "Sequence[int] | None") -> None:
        start = self._next.get((point, seq), 0)
        at = np.arange(start, start + rows) if positions is None else np.asarray(positions, dtype=np.int64)
        if len(at) != rows:
            raise ValueError(f"{point}: {len(at)} positions for {rows} rows")
        step = self._passes.get((point, seq), 0)
        kept = [i for i, position in enumerate(at.tolist()) if self._positions is None or position in self._positions]
        if kept:
            decode = step > 0 and rows == 1
            array = array if len(kept) == rows else array[:, kept] if array.ndim == 3 else array[kept]
            summary = summarise(point, array, at[kept], step=step, decode=decode, slice_size=self.slice_size, seq=seq)
            for line in checkpoint_lines(summary):
                self._write(line)
            self.checkpoints += len(summary)
        self._next[point, seq] = int(at[-1]) + 1 if len(at) else start
        self._passes[point, seq] = step + 1

    def inject(self, name: str, value: Any, positions: "Sequence[int] | None" = None) -> Any:
        """The value, with its rows replaced by the reference's if $PARITY_INJECT names a file that has them.

        Call it right after the checkpoint: `hidden = tap.inject("blk.5.l_out", hidden)`. [T, n] or [1, T, n], rows numbered as for
        the checkpoint; the result is an array of the same kind, type and device. For `parity run --exec … --bisect`; without that
        variable the result is the value itself.

        Raises:
            ValueError: the reference's rows have another number of values.
        """
        if not self._given:
            return value
        if is_captured(value):
            raise RuntimeError("values cannot be injected into a captured graph; run without graphs")
        point = resolve(name, self.layers)
        host = to_host(value)
        rows = host.reshape(-1, host.shape[-1]) if host.ndim > 1 else host[None]
        start = self._injected.get(point, 0)
        at = list(range(start, start + len(rows))) if positions is None else list(positions)
        self._injected[point] = at[-1] + 1 if at else start
        if point not in self._given:
            return value
        first, given = self._given[point]
        if given.shape[1] != rows.shape[1]:
            raise ValueError(f"{name} has {rows.shape[1]} values per row, the reference's {given.shape[1]}")
        for row, position in zip(rows, at, strict=True):
            if first <= position < first + len(given):
                row[:] = given[position - first]
        return _like(value, host)

    def token(self, position: int, number: int, text: str = "", seq: int = 0) -> None:
        """Record a generated token and the position that it will have."""
        with self._lock:
            self._write(token_line(Token(position, number, text, (), seq)))
            self.tokens += 1

    def hook(self, module: Any, names: "Mapping[str, str] | None" = None) -> "list[Any]":
        """Record the outputs of a PyTorch model's submodules: module name -> point, by default all whose names are known.

        Of a module and one inside it with the same point ("self_attn" and its "o_proj"), the outer one is recorded.

        Returns the handles: `handle.remove()` removes a hook.
        """
        self._head_rows.of_model(getattr(module, "config", None))
        handles = []
        hooked: dict[str, str] = {}  # module -> point
        parts = dict(module.named_modules())
        for name, part in parts.items():
            point = names.get(name) if names is not None else _point_of(name, parts, self.layers)
            if point is None:
                continue
            if names is None and any(point == other and name.startswith(f"{outer}.") for outer, other in hooked.items()):
                continue
            hooked[name] = point

            def record(_module: Any, _inputs: Any, output: Any, point: str = point) -> Any:
                value = output[0] if isinstance(output, tuple) else output
                self(point, value)
                if not self._given:
                    return None  # the output stays unchanged
                changed = self.inject(point, value)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            handles.append(part.register_forward_hook(record))
        return handles

    def _write(self, line: "dict[str, Any]") -> None:
        self._file.write(json.dumps(line, default=_as_json, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def close(self, *, complete: bool = True) -> None:
        """Close the file, with the end record if the dump is complete. A second call does nothing."""
        if self._file.closed:
            return
        try:
            self._graphs.close()
            if complete:
                self._write(end_line(self.checkpoints, self.tokens))
        finally:
            self._file.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: "type[BaseException] | None", *_: object) -> None:
        self.close(complete=kind is None)
