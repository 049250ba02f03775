"""Numbers of the metadata that llama.cpp does not compute with: its graph has another number of the same kind, or none.

An engine that follows the file is right and still differs from this reference, so answers say so wherever sides differ. The kinds are
those of operations' parameters; no architecture is known here.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from msgspec import Struct

from checkpoints.graph import INPUT, NODE, Graph, RecordedGraph, Tensor

from .ggml_ops.activations import UNARY_KINDS

_TANH = UNARY_KINDS.index("TANH")
_CLOSE = 1e-5  # relative: metadata are float32, and llama.cpp computes some parameters from them (1/c, √)
_SWITCHED_OFF = 1e20  # CLAMP's largest float32 where nothing is clamped

_MEANS = "an engine that follows the file differs from this reference"

Metadata = Mapping[str, Any]


class Ignored(Struct, frozen=True):
    """A number `stated` under `key` of the metadata, where llama.cpp's graph has `used` (empty: no such operation)."""

    key: str
    what: str
    stated: float
    used: tuple[float, ...]

    @property
    def sentence(self) -> str:
        """One line on what the reference does, and what that means for an engine."""
        used = " and ".join(f"{number:g}" for number in self.used)
        computes = f"computes with {used}" if used else "computes without"
        return f"{self.what}: llama.cpp {computes}, the file says {self.stated:g} ({self.key}): {_MEANS}"


class _Kind(Struct, frozen=True):
    """One kind of number.

    Attributes:
        keys: of the metadata, without the architecture's prefix.
        used: the numbers of this kind in a graph.
        needed: whether a model that has none of them ignores the key; otherwise the key has no meaning for it.
        scaling: the types of RoPE scaling that read the key; any if empty.
        by_layer: whether each key is of some layers, which may lack the operation: if the graph has only numbers of the other keys.
        accepted: the numbers of which one must be in the graph, if the file has this number; none if it has no effect.
    """

    keys: tuple[str, ...]
    what: str
    used: Callable[[Graph], Iterator[float]]
    needed: bool = False
    scaling: tuple[str, ...] = ()
    by_layer: bool = False
    accepted: Callable[[float], tuple[float, ...]] = lambda stated: (stated,)


def ignored(recorded: RecordedGraph | None, metadata: Metadata) -> tuple[Ignored, ...]:
    """The numbers that the metadata state and the graph computes otherwise; nothing without a graph."""
    if recorded is None:
        return ()
    graphs = [graph for graph in (recorded.several, recorded.encoder) if graph is not None]
    prefix = f"{recorded.architecture}."
    scaling = metadata.get(f"{prefix}rope.scaling.type", "linear")  # as llama_model::load_hparams takes it
    different: list[Ignored] = []
    for kind in _KINDS:
        if kind.scaling and scaling not in kind.scaling:
            continue
        used = tuple(sorted({number for graph in graphs for number in kind.used(graph)}))
        stated_numbers = {key: metadata.get(prefix + key) for key in kind.keys}
        for key, stated in stated_numbers.items():
            if isinstance(stated, bool) or not isinstance(stated, int | float) or not (used or kind.needed):
                continue
            others = [number for other, number in stated_numbers.items() if other != key and number is not None]
            if kind.by_layer and all(any(_same(number, other) for other in others) for number in used):
                continue
            accepted = kind.accepted(float(stated))
            if accepted and not any(_same(accepted_number, number) for accepted_number in accepted for number in used):
                different.append(Ignored(prefix + key, kind.what, float(f"{stated:.7g}"), used))
    return tuple(different)


def sentences(recorded: RecordedGraph | None, metadata: Metadata) -> tuple[str, ...]:
    """One sentence for each of them."""
    return tuple(item.sentence for item in ignored(recorded, metadata))


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= _CLOSE * max(abs(a), abs(b))


def _float(tensor: Tensor, index: int) -> float:
    """A parameter as the shortest number that is this float32."""
    return float(f"{struct.unpack('<f', struct.pack('<i', tensor.params[index]))[0]:.7g}")


def _nodes(graph: Graph, *ops: str) -> Iterator[Tensor]:
    return (tensor for tensor in graph.tensors if tensor.kind == NODE and tensor.op in ops)


def _parameter(op: str, index: int) -> Callable[[Graph], Iterator[float]]:
    return lambda graph: (_float(tensor, index) for tensor in _nodes(graph, op))


def _yarn(index: int) -> Callable[[Graph], Iterator[float]]:
    """A parameter of rotations that are a mixture by YaRN; the others don't read it."""
    return lambda graph: (_float(tensor, index) for tensor in _nodes(graph, "ROPE") if _float(tensor, 7))


def _rotated(graph: Graph) -> Iterator[float]:
    return (float(tensor.params[1]) for tensor in _nodes(graph, "ROPE"))


def _original_context(graph: Graph) -> Iterator[float]:
    return (float(tensor.params[4]) for tensor in _nodes(graph, "ROPE") if _float(tensor, 7))


def _caps(graph: Graph) -> Iterator[float]:
    """c of c · tanh(x / c)."""
    for index, tensor in enumerate(graph.tensors):
        if tensor.op == "UNARY" and tensor.params[0] == _TANH:
            readers = (graph.tensors[reader] for reader in graph.consumers.get(index, ()))
            yield from (_float(reader, 0) for reader in readers if reader.op == "SCALE")


def _factors(graph: Graph) -> Iterator[float]:
    """The numbers by which whole tensors are multiplied."""
    yield from (_float(tensor, 0) for tensor in _nodes(graph, "SCALE", "SOFT_MAX"))


def _windows(graph: Graph) -> Iterator[float]:
    """How many positions masks leave visible."""
    for tensor in graph.tensors:
        parameters = tensor.rule.parameters if tensor.kind == INPUT and tensor.rule is not None else {}
        if parameters.get("window") in ("standard", "chunked", "symmetric"):
            yield float(parameters["size"])


def _experts(graph: Graph) -> Iterator[float]:
    return (float(tensor.ne[1].fixed) for tensor in _nodes(graph, "MUL_MAT_ID"))


def _alibi(graph: Graph) -> Iterator[float]:
    return (bias for tensor in _nodes(graph, "SOFT_MAX") if (bias := _float(tensor, 1)))


def _clamps(graph: Graph) -> Iterator[float]:
    return (limit for tensor in _nodes(graph, "CLAMP") if abs(limit := _float(tensor, 1)) < _SWITCHED_OFF)


def _unless_zero(stated: float) -> tuple[float, ...]:
    return (stated,) if stated else ()


def _inverse(stated: float) -> tuple[float, ...]:
    return (1 / stated,) if stated else ()


def _either_way(stated: float) -> tuple[float, ...]:
    return (stated, 1 / stated) if stated not in (0, 1) else ()


_KINDS = (
    _Kind(("attention.layer_norm_rms_epsilon",), "ε of RMS norms", _parameter("RMS_NORM", 0)),
    _Kind(("attention.layer_norm_epsilon",), "ε of LayerNorm", _parameter("NORM", 0)),
    _Kind(("rope.freq_base", "rope.freq_base_swa"), "RoPE's base", _parameter("ROPE", 5), by_layer=True),
    _Kind(("rope.dimension_count",), "dimensions that RoPE rotates", _rotated),
    _Kind(
        ("rope.scaling.factor",),
        "RoPE's scale of positions",
        _parameter("ROPE", 6),
        scaling=("linear", "yarn"),
        accepted=_inverse,
    ),
    _Kind(("rope.scaling.original_context_length",), "YaRN's original context", _original_context),
    _Kind(("rope.scaling.yarn_beta_fast",), "YaRN's fast β", _yarn(9)),
    _Kind(("rope.scaling.yarn_beta_slow",), "YaRN's slow β", _yarn(10)),
    _Kind(
        ("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"),
        "soft cap",
        _caps,
        needed=True,
        accepted=_unless_zero,
    ),
    _Kind(("attention.sliding_window",), "attention's window", _windows, needed=True, accepted=_unless_zero),
    _Kind(("attention.scale", "logit_scale", "residual_scale", "embedding_scale"), "scale", _factors, accepted=_either_way),
    _Kind(("attention.max_alibi_bias",), "ALiBi's largest bias", _alibi, needed=True, accepted=_unless_zero),
    _Kind(("attention.clamp_kqv",), "clamp of Q, K and V", _clamps, needed=True, accepted=_unless_zero),
    _Kind(("expert_used_count",), "experts of a token", _experts),
)
