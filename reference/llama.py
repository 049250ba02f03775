"""llama.cpp through llama-cpp-python's low-level calls: load a model, tokenize, decode.

The settings are those of the cleanest reference: CPU, no repacked weights, no flash attention, no device,
one ubatch, logits of every position. It runs in the child process only: ggml aborts the process if an assertion fails.
"""

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import InputError, ModelError, ReferenceFailed

from .callback import Deliver, Tap
from .jobs import Node
from .library import Library, default_threads
from .naming import Planned

_KV_TYPES = {"f32": 0, "f16": 1}  # ggml_type


def model_params(api: Any) -> tuple[Any, Any]:
    """`llama_model_params` of the cleanest reference, and the empty list of devices that they point to, which must be kept alive."""
    params = api.llama_model_default_params()
    no_devices = (ctypes.c_void_p * 1)(None)
    params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    return params, no_devices


class Model:
    """A loaded model; `vocab_only` loads no weights and can tokenize.

    Raises:
        ModelError: llama.cpp refuses the file.
    """

    def __init__(self, library: Library, path: Path, *, vocab_only: bool = False) -> None:
        api = library.api
        self.library, self.path = library, path
        params, self._no_devices = model_params(api)
        params.vocab_only = vocab_only
        library.lines.clear()
        self._model = api.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise ModelError(f"llama.cpp cannot load {path}: {library.reason()}.", "Take another model file.", code="model")
        self._vocab = api.llama_model_get_vocab(self._model)
        self.n_vocab = int(api.llama_vocab_n_tokens(self._vocab))
        self.n_embd = int(api.llama_model_n_embd(self._model))
        self.n_layers = int(api.llama_model_n_layer(self._model))
        self.n_ctx_train = int(api.llama_model_n_ctx_train(self._model))
        self.n_params = int(api.llama_model_n_params(self._model))
        self.window = int(api.llama_model_n_swa(self._model))  # positions that windowed attention sees; 0 without one
        if vocab_only:  # llama.cpp leaves these at 0
            prefix = self._value("general.architecture")
            self.n_ctx_train = self._count(f"{prefix}.context_length")
            self.n_layers = self._count(f"{prefix}.block_count")

    def _count(self, key: str) -> int:
        """A whole number of the metadata, 0 if the key is missing."""
        text = self._value(key)
        return int(text) if text.isascii() and text.isdigit() else 0

    @property
    def embeds(self) -> bool:
        """Whether the model makes embeddings, not scores of tokens: an encoder alone, or a model whose file asks for pooling."""
        api = self.library.api
        pooling = self._value(f"{self._value('general.architecture')}.pooling_type")
        return not api.llama_model_has_decoder(self._model) or pooling not in ("", "0")

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder reads the prompt and a decoder generates (`llama_encode`, then `llama_decode`)."""
        api = self.library.api
        return bool(api.llama_model_has_encoder(self._model) and api.llama_model_has_decoder(self._model))

    @property
    def decoder_start(self) -> int:
        """The token that a decoder begins with (`llama_model_decoder_start_token`), or BOS if the file names none."""
        api = self.library.api
        start = int(api.llama_model_decoder_start_token(self._model))
        return start if start >= 0 else max(int(api.llama_vocab_bos(self._vocab)), 0)

    @property
    def handle(self) -> Any:
        """The `llama_model *`."""
        return self._model

    def _value(self, name: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        count = self.library.api.llama_model_meta_val_str(self._model, name.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if count >= 0 else ""

    def metadata(self) -> dict[str, str]:
        """Every metadata value as text (`llama_model_meta_val_str_by_index`); long arrays are cut by llama.cpp."""
        api, metadata = self.library.api, {}
        buffer = ctypes.create_string_buffer(1 << 16)
        for index in range(api.llama_model_meta_count(self._model)):
            api.llama_model_meta_key_by_index(self._model, index, buffer, len(buffer))
            key = buffer.value.decode(errors="replace")
            api.llama_model_meta_val_str_by_index(self._model, index, buffer, len(buffer))
            metadata[key] = buffer.value.decode(errors="replace")
        return metadata

    def _has_tokenizer(self) -> None:
        if self.library.api.llama_vocab_type(self._vocab) == 0:  # LLAMA_VOCAB_TYPE_NONE
            raise ModelError(f"{self.path} has no tokenizer.", "Give token ids (--tokens) instead of text.", code="tokenizer")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> tuple[int, ...]:
        """The ids of a text (`llama_tokenize`).

        Raises:
            ModelError: the file has no tokenizer.
        """
        self._has_tokenizer()
        api = self.library.api
        raw = text.encode(errors="surrogateescape")  # bytes of a command line that were not UTF-8
        room = len(raw) + 16
        for _ in range(2):
            ids = (api.llama_token * room)()
            count = api.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special, parse_special)
            if count >= 0:
                return tuple(ids[:count])
            room = -count
        raise ReferenceFailed(f"llama.cpp could not tokenize {len(raw)} bytes.", "Give --tokens instead.")

    def pieces(self, ids: Iterable[int]) -> tuple[str, ...]:
        """The text of each id, special tokens shown (`llama_token_to_piece`); half a character is U+FFFD."""
        api = self.library.api
        if api.llama_vocab_type(self._vocab) == 0:
            return ()
        texts: list[str] = []
        buffer = ctypes.create_string_buffer(256)
        for number in self.checked(ids):
            count = api.llama_token_to_piece(self._vocab, number, buffer, len(buffer), 0, True)
            if count < 0:
                buffer = ctypes.create_string_buffer(-count)
                count = api.llama_token_to_piece(self._vocab, number, buffer, len(buffer), 0, True)
            texts.append(buffer.raw[:count].decode(errors="replace"))
        return tuple(texts)

    def checked(self, ids: Iterable[int]) -> tuple[int, ...]:
        """The ids, all of them inside the vocabulary.

        Raises:
            InputError: one is not.
        """
        given = tuple(ids)
        for number in given:
            if not 0 <= number < self.n_vocab:
                raise InputError(
                    f"token id {number} is outside the vocabulary of {self.path.name} (0…{self.n_vocab - 1}).",
                    "`parity tokens` shows the ids of a text.",
                    code="tokens",
                )
        return given

    def special(self) -> tuple[int | None, int | None, bool, bool]:
        """(BOS, EOS, whether BOS is added, whether EOS is added)."""
        api, vocab = self.library.api, self._vocab
        bos, eos = int(api.llama_vocab_bos(vocab)), int(api.llama_vocab_eos(vocab))
        added = bool(api.llama_vocab_get_add_bos(vocab)), bool(api.llama_vocab_get_add_eos(vocab))
        return (bos if bos >= 0 else None, eos if eos >= 0 else None, *added)

    def ends(self, token: int) -> bool:
        """Whether a token ends generation (`llama_vocab_is_eog`)."""
        return bool(self.library.api.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        """Free its memory. A second call does nothing."""
        if self._model:
            self.library.api.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
        params.n_threads = params.n_threads_batch = threads or default_threads()
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
                f"llama.cpp cannot compute {model.path}: {model.library.reason()}.", "Free memory, or take a shorter prompt."
            )

    def list_nodes(self, inputs: Sequence[int] | NDArray[np.float32], *, encode: bool = False) -> list[Node]:
        """The nodes of the graph for these inputs, in the order of computation; nothing stays in the cache."""
        # The abort callback stops the computation at its first node, after the callback was asked about all. If the graph is
        # cut into several parts (a second backend), it was asked about the first only: then the whole pass has to be computed.
        nodes = self._list(inputs, encode)
        if not any(node.name.startswith("result_") for node in nodes):
            api = self.model.library.api
            never = api.ggml_abort_callback(lambda _data: False)
            api.llama_set_abort_callback(self._context, never, None)
            nodes = self._list(inputs, encode)
            api.llama_set_abort_callback(self._context, self._abort, None)
        self.clear()
        return nodes

    def _list(self, inputs: Sequence[int] | NDArray[np.float32], encode: bool) -> list[Node]:
        self.tap.list_nodes()
        self._decode(inputs, 0, encode=encode)
        self.tap.check()
        return self.tap.listed()

    def record(self, inputs: Sequence[int], first: int, asked: Callable[[int], None], *, encode: bool = False) -> None:
        """Hand the address of every node of a pass over these tokens to `asked`, computing nothing."""
        self.tap.record(asked)
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
