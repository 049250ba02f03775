"""The ordered vocabulary of capture points.

A *point* is the name of an activation: `embd`, `blk.5.q_rope`, `logits`. The vocabulary is open: a name of the form
`blk.N.<node>` that is not listed here is a valid point of layer N whose shape and place are unknown.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from msgspec import Struct

from .errors import InputError

EMBD = "embd"
OUTPUT_NORM = "output_norm"
LOGITS = "logits"
ENCODER = "enc."  # in front of the points of an encoder whose output a decoder reads, as in its weights' names


class Kind(Struct, frozen=True):
    """What one name stands for in every layer (or once in the model).

    `row` is the shape of one position's row, in these letters: D embedding, H heads, K key/value heads,
    d head size, F feed-forward, V vocabulary, t+1 the positions seen so far. `lane` names the branch of the layer to which
    the value belongs; values of two branches that have not met yet do not depend on each other. `op` is ggml's name for the
    operation that computes it in a plain transformer. `adds` names another point of the layer that this operation reads, in addition to
    its predecessors ("-": the layer's input). `optional`: not every model has it, or not every engine can record it.
    """

    name: str
    row: tuple[str, ...]
    meaning: str
    lane: str = ""
    op: str = "MUL_MAT"
    adds: str = ""
    optional: bool = False


LAYER_KINDS: tuple[Kind, ...] = (
    Kind("attn_norm", ("D",), "input of the attention, normalised", op="RMS_NORM"),
    Kind("q", ("H*d",), "queries after bias, before RoPE", "q"),
    Kind("k", ("K*d",), "keys after bias, before RoPE", "k"),
    Kind("v", ("K*d",), "values after bias", "v"),
    Kind("q_norm", ("H*d",), "queries after their own norm", "q", op="RMS_NORM", optional=True),
    Kind("k_norm", ("K*d",), "keys after their own norm", "k", op="RMS_NORM", optional=True),
    Kind("q_rope", ("H*d",), "queries after RoPE", "q", op="ROPE"),
    Kind("k_rope", ("K*d",), "keys after RoPE", "k", op="ROPE"),
    Kind("k_read", ("t+1", "K*d"), "key rows that attention read from the cache", "k", op="CACHE", optional=True),
    Kind("v_read", ("t+1", "K*d"), "value rows that attention read from the cache", "v", op="CACHE", optional=True),
    Kind("kq", ("H", "t+1"), "query-key products before scale and mask", "qk"),
    Kind("kq_soft_max", ("H", "t+1"), "attention weights", "qk", op="SOFT_MAX"),
    Kind("kqv_out", ("H*d",), "weighted values, heads side by side"),
    Kind("attn_out", ("D",), "attention's output projection"),
    Kind("ffn_inp", ("D",), "attention plus residual", op="ADD", adds="-"),
    Kind("ffn_norm", ("D",), "input of the feed-forward, normalised", op="RMS_NORM"),
    Kind("ffn_gate", ("F",), "gate projection", "gate"),
    Kind("ffn_up", ("F",), "up projection", "up"),
    Kind("ffn_swiglu", ("F",), "SiLU(gate) times up", op="GLU"),
    Kind("ffn_out", ("D",), "feed-forward's down projection"),
    Kind("l_out", ("D",), "the layer's output, residual included", op="ADD", adds="ffn_inp"),
)
MODEL_KINDS: tuple[Kind, ...] = (
    Kind(EMBD, ("D",), "token embedding", op="GET_ROWS"),
    Kind(OUTPUT_NORM, ("D",), "last layer's output, normalised", op="RMS_NORM"),
    Kind(LOGITS, ("V",), "scores of the next token"),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in (*MODEL_KINDS, *LAYER_KINDS)}
_RANK = {kind.name: rank for rank, kind in enumerate(LAYER_KINDS)}
# Branches of one layer that have not met: neither side's value can be caused by the other's.
_INDEPENDENT = {frozenset(pair) for pair in (("q", "k"), ("q", "v"), ("k", "v"), ("qk", "v"), ("gate", "up"))}

DEFAULT_LAYERS = (0, 5, 10, 23)
_LAYER_POINT = re.compile(r"blk\.(\d+)\.(.+)", re.DOTALL)


class Point(Struct, frozen=True):
    """A parsed point: `layer` is None for the points that occur once in a model; `kind` is its name within the layer."""

    name: str
    layer: int | None
    kind: str

    @property
    def known(self) -> Kind | None:
        """The vocabulary's entry, or None for a name that only the reference or a foreign engine uses."""
        kind = KINDS.get(self.kind)
        return kind if kind is not None and (self.layer is None) == (self.kind not in _RANK) else None


@lru_cache(maxsize=4096)  # more points than a model has
def parse(name: str) -> Point:
    """Split a canonical name into layer and kind; a name without a layer is a point of the whole model."""
    match = _LAYER_POINT.fullmatch(name)
    return Point(name, int(match[1]), match[2]) if match else Point(name, None, name)


def in_vocabulary(name: str) -> bool:
    """Whether it is a point of the vocabulary, an encoder's included, and not a node that only the reference or a foreign engine has."""
    return parse(name.removeprefix(ENCODER)).known is not None


def in_layer(layer: int, kind: str) -> str:
    """The name of `kind` in `layer`: in_layer(5, "l_out") is "blk.5.l_out"."""
    return f"blk.{layer}.{kind}"


def of_scores(name: str) -> bool:
    """Whether a value is attention's [H, T, S]: `kq` and its scaled and masked forms (`kq_soft_max`, `kq_scaled_1`).

    So are the one-head scores by which sparse attention chooses its keys (`indexer_score`).
    """
    stem = parse(name.removeprefix(ENCODER)).kind.partition(".")[0]  # an encoder's scores as well
    return stem == "kq" or stem.startswith(("kq_", "indexer_score"))


def default_points(available: Iterable[str], n_layers: int | None = None) -> list[str]:
    """The default set of a model with these points; of an encoder–decoder that of both halves, the encoder's first."""
    names = list(available)
    halves = {
        prefix: [parse(name.removeprefix(prefix)) for name in names if name.startswith(ENCODER) == bool(prefix)]
        for prefix in (ENCODER, "")
    }
    wanted: set[str] = set()
    for prefix, points in halves.items():
        layers = 1 + max((point.layer or 0 for point in points), default=0)
        chosen = default_layers(layers if prefix or n_layers is None else n_layers)
        wanted.update(prefix + name for name in layer_outputs(chosen))
    return [name for name in names if name in wanted]


def all_points(n_layers: int, kinds: Iterable[str] | None = None) -> list[str]:
    """Every point of the vocabulary for a model of `n_layers`, in dataflow order; `kinds`, if given, restricts those of each layer."""
    names = [kind.name for kind in LAYER_KINDS if kinds is None or kind.name in set(kinds)]
    return [EMBD, *(in_layer(i, name) for i in range(n_layers) for name in names), OUTPUT_NORM, LOGITS]


def default_layers(n_layers: int) -> list[int]:
    """Layers 0, 5, 10 and 23 if they exist, and always the last."""
    return sorted({layer for layer in DEFAULT_LAYERS if layer < n_layers} | {n_layers - 1})


def layer_outputs(layers: Iterable[int]) -> list[str]:
    """The default set for the given layers: embedding, those layers' outputs, output norm, logits."""
    return [EMBD, *(in_layer(layer, "l_out") for layer in layers), OUTPUT_NORM, LOGITS]


def order(names: Iterable[str]) -> list[str]:
    """Sort names by dataflow; duplicates are dropped.

    Known points take the vocabulary's order. An unknown node comes after the name of its layer that preceded it
    in `names`, so that a list in the reference's order of computation keeps its unknown nodes in place.
    """
    unique = list(dict.fromkeys(names))
    place: dict[str, tuple[int, float, int]] = {}
    last: dict[int, float] = {}
    begin = next((index for index, name in enumerate(unique) if parse(name).layer is not None), 0)
    for index, name in enumerate(unique):
        point = parse(name)
        # Names listed before the first layer are computed before it: added position embeddings, a norm of the embedding.
        section = -1 if index < begin and point.known is None else _section(point)
        if point.known is not None:
            rank = float(_RANK.get(point.kind, 0))
            last[section] = max(rank, last.get(section, -1.0))
            place[name] = (section, rank, -1)
        else:
            place[name] = (section, last.get(section, -0.5), index)
    return sorted(unique, key=place.__getitem__)


_END = 1 << 40  # after every layer: names without a layer


def _section(point: Point) -> int:
    """A number that grows along the model: -1 for the embedding, the layer's number, then norm, logits and names without a layer."""
    if point.layer is not None:
        return point.layer
    return {EMBD: -1, OUTPUT_NORM: _END, LOGITS: _END + 2}.get(point.kind, _END + 1)


def apart(a: str, b: str) -> bool:
    """Whether two branches of one layer have not met."""
    return frozenset((a, b)) in _INDEPENDENT


def lanes() -> set[str]:
    """The branches of a layer; "" is where they have met."""
    return {kind.lane for kind in LAYER_KINDS}


_HUGGING_FACE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn": "attn_out",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_out",
    "mlp": "ffn_out",
    "": "l_out",
}
_ONCE = {
    "C0": EMBD,
    "C1": "blk.0.l_out",
    "C5": "blk.5.l_out",
    "C10": "blk.10.l_out",
    "C23": "blk.23.l_out",
    "C24": OUTPUT_NORM,
    "C25": LOGITS,
    "inp_embd": EMBD,
    "embedding": EMBD,
    "embeddings": EMBD,
    "embed_tokens": EMBD,
    "token_embd": EMBD,
    "result_norm": OUTPUT_NORM,
    "norm": OUTPUT_NORM,
    "final_norm": OUTPUT_NORM,
    "result_output": LOGITS,
    "lm_head": LOGITS,
}


def resolve(name: str, n_layers: int | None = None) -> str:
    """The canonical name of an alias (C0…C25, `layer_5`, ggml's and Hugging Face's names), otherwise the name itself.

    Hugging Face's `hidden_states[i]` is layer i's *input*, and its last one comes after the norm: that one is recognised
    by the number of layers, without which only index 0 is known.
    """
    name = name.strip()
    if name in _ONCE:
        return _ONCE[name]
    if match := re.fullmatch(r"(?:layer|layers|blk|block)[._-]?(\d+)(?:[._-](?:out|output|l_out))?", name):
        return in_layer(int(match[1]), "l_out")
    if match := re.fullmatch(r"([A-Za-z_]\w*)-(\d+)", name):
        return in_layer(int(match[2]), match[1])
    if match := re.fullmatch(r"hidden_states\[(\d+)\]", name):
        index = int(match[1])
        if index == 0:
            return EMBD
        if n_layers is not None and index <= n_layers:
            return OUTPUT_NORM if index == n_layers else in_layer(index - 1, "l_out")
        return name
    if match := re.fullmatch(r"(?:model\.)?layers\.(\d+)\.?(.*)", name):
        kind = _HUGGING_FACE.get(match[2], match[2] if match[2] in _RANK else None)
        return in_layer(int(match[1]), kind) if kind is not None else name
    bare = name.removeprefix("model.")
    return _ONCE.get(bare, name)


_MAX_EXPANSION = 10_000  # names that one --points expression may stand for; 80 layers × 21 points are 1,680


def expand(expression: str) -> list[str]:
    """Split a `--points` expression at commas and expand braces: "blk.{1..3}.{q,k}" becomes six globs.

    `{a,b}` lists and `{1..5}` ranges expand as in a shell, whether or not such points exist.

    Raises:
        InputError: unbalanced braces, a range of something else than numbers, or more than 10,000 names.
    """
    parts: list[str] = []
    depth, start = 0, 0
    for index, char in enumerate(expression):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth < 0:
            break
        if char == "," and depth == 0:
            parts.append(expression[start:index])
            start = index + 1
    if depth:
        raise InputError(f"unbalanced braces in {expression!r}.", "Write e.g. 'blk.{1..5}.{q,k}'.", code="points")
    parts.append(expression[start:])
    names = list(dict.fromkeys(name for part in parts if part.strip() for name in _braces(part.strip())))
    if len(names) > _MAX_EXPANSION:
        raise InputError(f"{expression!r} stands for more than {_MAX_EXPANSION:,} names.", "Use *.", code="points")
    return names


def _braces(text: str) -> list[str]:
    match = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", text)  # as in a shell, `{}` and `{x}` stay as they are
    if not match:
        return [text]
    options = match[1].split(",")
    if len(options) == 1:
        span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1])
        if not span:
            raise InputError(f"{match[0]} is not a range of numbers.", "Write e.g. {1..5}, or * for all.", code="points")
        first, last = int(span[1]), int(span[2])
        if abs(last - first) >= _MAX_EXPANSION:
            raise InputError(f"the range {match[0]} is too long.", "Use *.", code="points")
        down = -1 if last < first else 1
        options = [str(number) for number in range(first, last + down, down)]
    expanded: list[str] = []
    for option in options:
        expanded += _braces(text[: match.start()] + option + text[match.end() :])
        if len(expanded) > _MAX_EXPANSION:
            raise InputError(f"{text!r} stands for more than {_MAX_EXPANSION:,} names.", "Use *.", code="points")
    return expanded


def select(expression: str, available: Sequence[str], n_layers: int | None = None) -> list[str]:
    """The available points that a `--points` expression names, in the order of `available`.

    `all` and `default` are keywords; anything else is a comma-separated list of globs, names and aliases, with braces.

    Raises:
        InputError: a part of the expression matches no available point; the nearest names are suggested.
    """
    wanted: set[str] = set()
    for part in expand(expression):
        if part == "all":
            wanted.update(available)
            continue
        if part == "default":
            wanted.update(default_points(available, n_layers))
            continue
        pattern = resolve(part, n_layers)
        matched = [name for name in available if name == pattern or fnmatchcase(name, pattern)]
        if not matched:
            from difflib import get_close_matches

            near = get_close_matches(pattern, available, n=3)
            hint = f"Nearest: {', '.join(near)}." if near else "`parity model M` lists the points of a model."
            raise InputError(f"there is no point {part!r}.", hint, code="points")
        wanted.update(matched)
    if not wanted:
        raise InputError("--points selects nothing.", "Write e.g. --points all.", code="points")
    return [name for name in available if name in wanted]
