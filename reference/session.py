"""A context of llama.cpp, through llama-cpp-python's low-level calls: lists graphs, computes, shows every value.

The settings are those of the cleanest reference: no flash attention, nothing handed to a device, one ubatch, logits of every position.
Used in the child process only: ggml aborts the process if one of its assertions fails.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import ReferenceFailed
from checkpoints.room import cores

from .callback import Deliver, Noted, Tap
from .jobs import Node, Outline
from .model import Model
from .naming import Planned

_KV_TYPES = {"f32": 0, "f16": 1}  # ggml_type


class Session:
    """A context of a model: its KV cache, and the tap that sees every value.

    Args:
        model: loaded with weights.
        n_ctx: positions in all; `n_batch` the most in one forward pass, `n_ubatch` the most that are computed at once (all).
        n_seq: sequences that one pass may hold; they share one cache (`kv_unified`), so that a pass is one graph.

    Raises:
        ReferenceFailed: llama.cpp cannot create a context.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_batch: int,
        kv_type: str = "f32",
        threads: int | None = None,
        n_ubatch: int | None = None,
        n_seq: int = 1,
    ) -> None:
        api = model.library.api
        self.model = model
        self.tap = Tap(model.library.ggml)
        self._eval = api.ggml_backend_sched_eval_callback(self.tap)  # kept, since the context holds only the pointer
        self._abort = api.ggml_abort_callback(lambda _data: self.tap.stop)
        params = api.llama_context_default_params()
        n_batch = max(n_batch, 4)  # a short prompt's graph is listed for more tokens, too
        params.n_ctx, params.n_batch, params.n_ubatch = max(n_ctx, n_batch), n_batch, n_ubatch or n_batch
        params.n_seq_max, params.kv_unified = n_seq, n_seq > 1
        params.embeddings = model.embeds
        params.n_threads = params.n_threads_batch = threads or cores()
        params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED; the default is AUTO, which was ON
        params.type_k = params.type_v = _KV_TYPES[kv_type]
        params.offload_kqv = params.op_offload = False
        params.swa_full = True  # so that a cache's rows are its positions
        params.no_perf = True
        params.cb_eval, params.abort_callback = self._eval, self._abort
        model.library.lines.clear()
        self._context = api.llama_init_from_model(model.handle, params)
        if not self._context:
            raise ReferenceFailed(
                f"llama.cpp cannot compute {model.path}: {model.library.reason()}.",
                "If memory is short, free some or use a shorter prompt; --verbose shows llama.cpp's log.",
            )

    def list_nodes(self, inputs: Sequence[int] | NDArray[np.float32], *, encode: bool = False) -> list[Node]:
        """The nodes of the graph for these inputs, in the order of computation; nothing stays in the cache."""
        # The abort callback stops the computation at its first node, after the callback was asked about all. If the graph is
        # cut into several parts (a second backend), it was asked about the first only: then the whole pass has to be computed.
        return self._list(inputs, encode, self.tap.list_nodes, self.tap.listed)

    def outline_nodes(self, inputs: Sequence[int] | NDArray[np.float32], *, encode: bool = False) -> list[Outline]:
        """As `list_nodes`, but of each node only what finds it in another pass, and its shape."""
        return self._list(inputs, encode, self.tap.outline, self.tap.outlined)

    def _list(
        self,
        inputs: Sequence[int] | NDArray[np.float32],
        encode: bool,
        begin: Callable[[], None],
        noted: Callable[[], list[Noted]],
    ) -> list[Noted]:
        def nodes() -> list[Noted]:
            begin()
            self._decode(inputs, 0, encode=encode)
            self.tap.check()
            return noted()

        listed = nodes()
        if not any(node.name.startswith("result_") for node in listed):
            api = self.model.library.api
            do_not_abort = api.ggml_abort_callback(lambda _data: False)
            api.llama_set_abort_callback(self._context, do_not_abort, None)
            listed = nodes()
            api.llama_set_abort_callback(self._context, self._abort, None)
        self.clear()
        return listed

    def record(self, inputs: Sequence[int], first: int, record_node: Callable[[int], None], *, encode: bool = False) -> None:
        """Hand the address of every node of a pass over these tokens to `record_node`, computing nothing."""
        self.tap.record(record_node)
        self._decode(inputs, first, encode=encode)
        self.tap.check()

    def skip(self, inputs: Sequence[int], first: int) -> None:
        """Put these positions into the cache without computing their contents, only to see graphs over a filled cache.

        Raises:
            ReferenceFailed: llama.cpp refused them.
        """
        self.tap.skip()
        status = self._decode(inputs, first)
        if status != 0:
            raise ReferenceFailed(f"llama.cpp did not accept {len(inputs)} positions (status {status}).", "Run with --verbose.")

    def last_position(self) -> int | None:
        """The last position in the memory; None if it is empty or the model has no memory."""
        api = self.model.library.api
        memory = api.llama_get_memory(self._context)
        last = int(api.llama_memory_seq_pos_max(memory, 0)) if memory else -1
        return last if last >= 0 else None

    def can_move_positions(self) -> bool:
        """Whether cached keys may be given other positions (`llama_memory_can_shift`)."""
        api = self.model.library.api
        memory = api.llama_get_memory(self._context)
        return bool(memory) and bool(api.llama_memory_can_shift(memory))

    def move_positions(self, first: int, by: int) -> None:
        """Move what is cached at position `first` and later by `by` positions (`llama_memory_seq_add`).

        The next pass rotates the keys again before its own graph.
        """
        api = self.model.library.api
        api.llama_memory_seq_add(api.llama_get_memory(self._context), 0, first, -1, by)

    def clear(self) -> None:
        """Forget every position."""
        api = self.model.library.api
        memory = api.llama_get_memory(self._context)
        if memory:
            api.llama_memory_clear(memory, True)

    def decode(
        self,
        inputs: Sequence[int] | NDArray[np.float32],
        first: int,
        wanted: Iterable[Planned] = (),
        deliver: Deliver | None = None,
        *,
        encode: bool = False,
        again: Callable[[], Iterable[Planned]] | None = None,
        companions: Sequence[Sequence[int]] = (),
    ) -> None:
        """Compute positions first, first + 1, … (`llama_decode`; `llama_encode` for an encoder's pass).

        Args:
            inputs: token ids [T], or hidden states [T, D] that enter the first layer.
            wanted: the values that are handed to `deliver` as they are computed.
            again: returns the values that `deliver` gets from each further ubatch.
            companions: token ids of sequences 0, 1, … that come before these inputs in the batch, from position 0.

        Raises:
            ReferenceFailed: llama.cpp refused, or ran out of memory. Also anything that `deliver` raises.
        """
        self.tap.take(wanted, deliver, again)
        self.model.library.lines.clear()
        status = self._decode(inputs, first, encode=encode, companions=companions)
        self.tap.check()
        if status != 0:
            raise ReferenceFailed(
                f"llama.cpp did not compute {len(inputs)} positions (status {status}): {self.model.library.reason()}.",
                "Run again with --verbose to see its log.",
            )

    def _decode(
        self,
        inputs: Sequence[int] | NDArray[np.float32],
        first: int,
        *,
        encode: bool = False,
        companions: Sequence[Sequence[int]] = (),
    ) -> int:
        api, own = self.model.library.api, len(inputs)
        others = [(token, place, seq) for seq, ids in enumerate(companions) for place, token in enumerate(ids)]
        count = len(others) + own
        hidden = np.ascontiguousarray(inputs, np.float32) if isinstance(inputs, np.ndarray) else None
        batch = api.llama_batch_init(count, 0 if hidden is None else self.model.n_embd, 1)
        try:
            batch.n_tokens = count
            if hidden is not None:
                ctypes.memmove(batch.embd, hidden.ctypes.data, hidden.nbytes)
            for i, (token, place, seq) in enumerate(others):
                batch.token[i], batch.pos[i], batch.seq_id[i][0] = token, place, seq
            for i in range(own):
                at = len(others) + i
                if hidden is None:
                    batch.token[at] = int(inputs[i])
                batch.pos[at] = first + i
                batch.seq_id[at][0] = len(companions)
            for i in range(count):
                batch.n_seq_id[i] = 1
                batch.logits[i] = 1  # else the last layer computes only the rows that were asked for
            return int((api.llama_encode if encode else api.llama_decode)(self._context, batch))
        finally:
            api.llama_batch_free(batch)

    def logits(self) -> NDArray[np.float32]:
        """The logits of the last position of the last pass: float32 [V]."""
        pointer = self.model.library.api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,)).copy()

    def state(self) -> bytes:
        """Everything that a new session needs to continue (`llama_state_get_data`)."""
        api = self.model.library.api
        size = int(api.llama_state_get_size(self._context))
        buffer = (ctypes.c_uint8 * size)()
        return bytes(buffer[: int(api.llama_state_get_data(self._context, buffer, size))])

    def restore(self, state: bytes) -> None:
        """Continue from a state (`llama_state_set_data`).

        Raises:
            ReferenceFailed: llama.cpp does not accept it.
        """
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if int(self.model.library.api.llama_state_set_data(self._context, buffer, len(state))) != len(state):
            raise ReferenceFailed("llama.cpp does not accept the state that it saved.", "Run with --verbose.")

    def close(self) -> None:
        """Free its memory. A second call does nothing."""
        if self._context:
            self.model.library.api.llama_free(self._context)
            self._context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
