"""What chat templates make of a text: llama.cpp's built-in ones and the file's own, as one message of a user."""

import ctypes

from .library import Library

_OWN = "tokenizer.chat_template"
_LARGEST = 1 << 20  # bytes around a text: the longest built-in template adds some hundred


def chat_texts(library: Library, own: str, text: str) -> dict[str, str]:
    """Template name -> the text with what that template puts around it, the assistant's turn opened; "own" is `own`, if it has a kind.

    Mirrors `llama_chat_apply_template`, which knows a template by its marks and runs no Jinja.
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
    """The template in a file's metadata, "" without one."""
    return metadata.get(_OWN, "")
