"""A text as one user message in chat templates: llama.cpp's built-in ones and the file's own."""

import ctypes

from .library import Library

_OWN = "tokenizer.chat_template"
_LARGEST = 1 << 20  # bytes that a template may add to a text: the longest built-in one adds some hundred


def chat_texts(library: Library, own: str, text: str) -> dict[str, str]:
    """Template name -> the text wrapped in that template, with the assistant's turn opened; "own" is `own`, if its kind is known.

    Mirrors `llama_chat_apply_template`, which recognises a template by its markers and does not run Jinja.
    """
    api = library.api
    count = api.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * count)()
    api.llama_chat_builtin_templates(names, count)
    templates = {"own": own.encode(errors="replace")} if own else {}
    templates |= {name.decode(): name for name in names if name}
    raw = text.encode(errors="surrogateescape")
    message = (api.llama_chat_message * 1)()
    message[0].role, message[0].content = b"user", raw
    buffer = ctypes.create_string_buffer(len(raw) + _LARGEST)
    texts: dict[str, str] = {}
    for name, template in templates.items():
        size = api.llama_chat_apply_template(template, message, 1, True, buffer, len(buffer))
        if 0 < size <= len(buffer):
            texts[name] = buffer.raw[:size].decode(errors="replace")
    return texts


def own_template(metadata: dict[str, str]) -> str:
    """The template in a file's metadata, "" if there is none."""
    return metadata.get(_OWN, "")
