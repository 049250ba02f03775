"""The words of a header that decide how a dump is judged, in all known spellings; any other word is an error that lists them."""

import re

_FLOATS = {
    "f64": ("f64", "float64", "fp64", "double"),
    "f32": ("f32", "float32", "fp32", "float", "single"),
    "tf32": ("tf32", "tensorfloat32"),
    "f16": ("f16", "float16", "fp16", "half"),
    "bf16": ("bf16", "bfloat16"),
}
_SPELLINGS = {spelling: word for word, spellings in _FLOATS.items() for spelling in spellings}
KNOWN_ARITHMETIC = {**_SPELLINGS, "q8": "q8", "int8": "q8", "i8": "q8"}
_MODES = {"exact": "exact", "native": "native"}
_CACHES = {word: name for word, name in _SPELLINGS.items() if name != "tf32"}
# ggml's quantised types, the mixtures of llama.cpp's file types, and the small floats that other engines keep caches in.
_QUANTISED = re.compile(r"(i?q|tq|mxfp|nvfp)\d\w*|[if]p?\d+(_?e\dm\d\w*)?|float8(_?e\dm\d\w*)?|int\d+|guessed")
_UNKNOWN = ("", "unknown", "none", "null")


def mode(text: str) -> str:
    """ "exact" or "native"; empty where nothing is said.

    Raises:
        ValueError: another word.
    """
    return _known(text, "mode", _MODES)


def compute(text: str) -> str:
    """The arithmetic: f64, f32, tf32, f16, bf16, q8 (8-bit activations); empty where nothing is said.

    Raises:
        ValueError: another word.
    """
    return _known(text, "compute", KNOWN_ARITHMETIC)


def kv_type(text: str) -> str:
    """The type of the KV cache: a float, or a quantised type in lower case; empty where nothing is said.

    Raises:
        ValueError: another word.
    """
    return _known(text, "kv_type", _CACHES, quantised=True)


def file_type(text: str) -> str:
    """The type of most weights: floats in capitals, others unchanged; empty if it is not stated.

    Raises:
        ValueError: another word.
    """
    plain = re.sub(r"(?i)^(mostly|all)_", "", text.strip())
    known = _known(plain, "file_type", _CACHES, quantised=True)
    return known.upper() if known in _FLOATS else ("" if not known else plain)


def _known(text: str, name: str, spellings: dict[str, str], *, quantised: bool = False) -> str:
    word = text.strip().lower().removeprefix("torch.")
    if word in _UNKNOWN:
        return ""
    if word in spellings:
        return spellings[word]
    if quantised and _QUANTISED.fullmatch(re.split(r"[\s-]", word)[0]):
        return word
    listed = ", ".join(dict.fromkeys(spellings.values())) + (", or a quantised type such as q8_0" if quantised else "")
    raise ValueError(f'"{name}" is {text!r:.40}, which is not known: write {listed}')
