"""A model that llama.cpp has loaded, through llama-cpp-python's low-level calls: its numbers, its vocabulary, its tokenizer.

The settings are those of the cleanest reference: CPU, no repacked weights, nothing handed to a device. Used in the child process only:
ggml aborts the process if one of its assertions fails.
"""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from checkpoints.errors import InputError, ModelError, ReferenceFailed

from .library import Library

_ROPES = {0: "NORM", 2: "NEOX", 8: "MROPE", 24: "VISION", 40: "IMROPE"}  # enum llama_rope_type


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
            raise ModelError(f"llama.cpp cannot load {path}: {library.reason()}.", "Use another model file.", code="model")
        self._vocab = api.llama_model_get_vocab(self._model)
        self.n_vocab = int(api.llama_vocab_n_tokens(self._vocab))
        self.n_embd = int(api.llama_model_n_embd(self._model))
        self.n_layers = int(api.llama_model_n_layer(self._model))
        self.n_ctx_train = int(api.llama_model_n_ctx_train(self._model)) % (1 << 32)  # the file's uint32, given as an int32
        self.n_params = int(api.llama_model_n_params(self._model))
        self.window = int(api.llama_model_n_swa(self._model))  # positions that windowed attention sees; 0 without one
        if vocab_only:  # llama.cpp leaves these at 0
            prefix = self._value("general.architecture")
            self.n_ctx_train = self._count(f"{prefix}.context_length")
            self.n_layers = self._count(f"{prefix}.block_count") * max(self._count(f"{prefix}.num_loops"), 1)

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
    def rope(self) -> str:
        """Which elements RoPE rotates with each other (`llama_model_rope_type`): "NORM", "NEOX", "MROPE", …; "" where it rotates none."""
        return _ROPES.get(int(self.library.api.llama_model_rope_type(self._model)), "")

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
        return tuple(piece.decode(errors="replace") for piece in self._bytes(ids))

    def text(self, ids: Iterable[int]) -> str:
        """The text of all ids together, special tokens shown; half a character at either end is left out."""
        return b"".join(self._bytes(ids)).decode(errors="ignore")

    def _bytes(self, ids: Iterable[int]) -> list[bytes]:
        api = self.library.api
        if api.llama_vocab_type(self._vocab) == 0:
            return []
        pieces: list[bytes] = []
        buffer = ctypes.create_string_buffer(256)
        for number in self.checked(ids):
            count = api.llama_token_to_piece(self._vocab, number, buffer, len(buffer), 0, True)
            if count < 0:
                buffer = ctypes.create_string_buffer(-count)
                count = api.llama_token_to_piece(self._vocab, number, buffer, len(buffer), 0, True)
            pieces.append(buffer.raw[:count])
        return pieces

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
