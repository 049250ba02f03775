"""What llama.cpp's graph says that an engine must know: of each layer its norms, rotation, attention, activation, experts, states.

Layers that are built alike are said once. Everything is read from operations and their parameters, nothing from a list of
architectures; a number that stands in the metadata and is not used is not said.
"""

import struct
from collections.abc import Iterator, Mapping
from itertools import groupby
from math import log
from typing import Any

from checkpoints.graph import CACHE, NODE, VIEWS, WEIGHT, Graph, RecordedGraph, Tensor
from checkpoints.points import parse
from engine.ggml_ops.activations import GLU_KINDS, UNARY_KINDS
from reports.numbers import ranges

_NEOX, _MROPE = 2, 8  # bits of a rotation's mode (ggml.h)
_NORMS = {"RMS_NORM": "RMS", "NORM": "LayerNorm", "L2_NORM": "L2", "GROUP_NORM": "group"}
_TANH, _SIGMOID = UNARY_KINDS.index("TANH"), UNARY_KINDS.index("SIGMOID")
_STATES = ("SSM_SCAN", "SSM_CONV", "GATED_DELTA_NET", "RWKV_WKV6", "RWKV_WKV7", "GATED_LINEAR_ATTN")

Facts = dict[str, Any]


def graph_facts(recorded: RecordedGraph) -> Facts:
    """What stands once in the model, and `layers`: spans of layers that are built alike with what each of them does."""
    graph = _Read(recorded.several)
    layers = {number: graph.layer(number) for number in graph.numbers}
    spans: dict[str, Facts] = {}
    for facts, numbers in _alike(layers):
        spans[ranges(tuple(numbers))] = facts
    return {**graph.once(), "layers_by_kind": spans}


def rotates(recorded: RecordedGraph) -> bool:
    """Whether anything is rotated by its position (RoPE)."""
    return any(tensor.op == "ROPE" for tensor in recorded.several.tensors)


def _alike(layers: Mapping[int, Facts]) -> Iterator[tuple[Facts, list[int]]]:
    """Facts with the layers that they hold for, in the order of the first of them."""
    by_facts = sorted(layers, key=lambda number: (repr(layers[number]), number))
    groups = [list(numbers) for _, numbers in groupby(by_facts, key=lambda number: repr(layers[number]))]
    for numbers in sorted(groups):
        yield layers[numbers[0]], numbers


def _float(tensor: Tensor, index: int) -> float:
    """A parameter as the shortest number that is this float32."""
    value: float = struct.unpack("<f", struct.pack("<i", tensor.params[index]))[0]
    return float(f"{value:.7g}")


class _Read:
    """A graph, layer by layer. A node without a point stands where what it is made from does."""

    def __init__(self, graph: Graph) -> None:
        self._tensors = graph.tensors
        self._graph = graph
        self._inside: dict[int | None, list[int]] = {}
        for i, tensor in enumerate(graph.tensors):
            if tensor.kind != NODE or not tensor.point:
                continue
            source = tensor.sources[0] if tensor.sources else None
            if tensor.op not in VIEWS:
                self._inside.setdefault(parse(tensor.point).layer, []).append(i)
            elif source is not None and graph.tensors[source].op in _STATES:  # its rows are a view of it, its states another
                self._inside.setdefault(parse(tensor.point).layer, []).append(source)

    @property
    def numbers(self) -> list[int]:
        """The layers' numbers."""
        return sorted(number for number in self._inside if number is not None)

    def layer(self, number: int) -> Facts:
        """What a layer does, as far as its graph says."""
        inside = self._inside[number]
        facts: Facts = {}
        for read in (self._norms, self._rope, self._attention, self._activation, self._experts, self._states, self._scales):
            facts |= read(inside)
        return facts

    def once(self) -> Facts:
        """What is done before the first layer and after the last one."""
        inside = self._inside.get(None, [])
        facts: Facts = self._norms(inside, "norms_outside_layers")
        if scales := [_said_scale(tensor) for tensor in self._of(inside, "SCALE")]:
            facts["scales_outside_layers"] = scales
        if cap := self._cap(inside):
            facts["logit_soft_cap"] = cap
        return facts

    def _of(self, inside: list[int], *ops: str) -> Iterator[Tensor]:
        return (self._tensors[i] for i in inside if self._tensors[i].op in ops)

    def _weights(self, tensor: Tensor) -> list[str]:
        """The kinds of weights that a node reads: "attn_norm.weight"."""
        names = [self._tensors[self._graph.root_of(i)] for i in tensor.sources if i is not None]
        return [parse(source.name).kind for source in names if source.kind == WEIGHT]

    def _norms(self, inside: list[int], key: str = "norms") -> Facts:
        named: dict[str, list[str]] = {}
        for i in inside:
            tensor = self._tensors[i]
            if tensor.op not in _NORMS:
                continue
            readers = [self._tensors[j] for j in self._readers(i)]
            weights = [kind for reader in readers if reader.op == "MUL" for kind in self._weights(reader)]
            subject = weights[0].removesuffix(".weight") if weights else f"{tensor.point} (no weight)"
            width = f" over {tensor.ne[0].fixed}"
            named.setdefault(f"{_NORMS[tensor.op]}, ε {_float(tensor, 0):g}", []).append(parse(subject).kind + width)
        return {key: {kind: ", ".join(dict.fromkeys(names)) for kind, names in named.items()}} if named else {}

    def _readers(self, i: int) -> Iterator[int]:
        """What reads a node, through views."""
        for j in self._graph.consumers.get(i, ()):
            if self._tensors[j].op in VIEWS:
                yield from self._readers(j)
            else:
                yield j

    def _rope(self, inside: list[int]) -> Facts:
        lines: list[str] = []
        rotated: list[str] = []
        for tensor in self._of(inside, "ROPE"):
            rotated.append(parse(tensor.point).kind)
            mode = tensor.params[2]
            pairs = "NEOX (x[i] with x[i + d/2])" if mode & _NEOX else "NORM (x[2i] with x[2i + 1])"
            parts = [f"{tensor.params[1]} of {tensor.ne[0].fixed} dimensions", f"base {_float(tensor, 5):g}"]
            if mode & _MROPE:
                kind = "interleaved sections" if mode == 40 else "sections"
                parts.append(f"{kind} {', '.join(map(str, tensor.params[11:15]))}")
            else:
                parts.insert(0, pairs)
            scale, mix, magnitude = (_float(tensor, place) for place in (6, 7, 8))
            if scale != 1:
                parts.append(f"positions times {scale:g}")
            if mix != 0:
                fast, slow = _float(tensor, 9), _float(tensor, 10)
                parts.append(f"YaRN from {tensor.params[4]} positions, mix {mix:g}, β {fast:g} and {slow:g}")
                magnitude *= 1 + 0.1 * log(1 / scale)  # rope_yarn of ggml does so, whatever magnitude it is given
            if f"{magnitude:g}" != "1":
                parts.append(f"cos and sin times {magnitude:g}")
            factors = [self._tensors[i].name for i in tensor.sources[2:3] if i is not None]
            parts += [f"frequency factors {parse(name).kind}" for name in factors]
            lines.append(", ".join(parts))
        return {"rope": " · ".join(dict.fromkeys(lines)), "after_rope": ", ".join(dict.fromkeys(rotated))} if lines else {}

    def _attention(self, inside: list[int]) -> Facts:
        facts: Facts = {}
        for tensor in self._of(inside, "SOFT_MAX"):
            if parse(tensor.point).kind != "kq_soft_max":
                continue
            facts["heads"] = tensor.ne[2].fixed
            facts["attention_scale"] = _float(tensor, 0)
            mask = None if len(tensor.sources) < 2 or tensor.sources[1] is None else self._tensors[tensor.sources[1]]
            if mask is not None and mask.rule is not None:
                window, size = mask.rule.parameters.get("window"), mask.rule.parameters.get("size")
                facts["sees"] = _WINDOWS.get(str(window), str(window)).format(size=size)
            if (bias := _float(tensor, 1)) != 0:
                facts["alibi_max_bias"] = bias
            if len(tensor.sources) > 2 and tensor.sources[2] is not None:
                facts["attention_sinks"] = parse(self._tensors[tensor.sources[2]].name).kind
        if not facts:
            return {}
        if cap := self._cap(inside):
            facts["attention_soft_cap"] = cap
        read = {self._cache(i) for i in inside if parse(self._tensors[i].point).kind == "kq"} - {None}
        own = {parse(self._tensors[i].point).layer for i in inside}
        if read and not read & own:
            facts["cache_of_layer"] = next(iter(read))
        return {"attention": facts}

    def _cache(self, i: int) -> int | None:
        source = self._tensors[i].sources[0]
        root = None if source is None else self._tensors[self._graph.root_of(source)]
        return int(root.name.rpartition("_l")[2]) if root is not None and root.kind == CACHE else None

    def _cap(self, inside: list[int]) -> float | None:
        """c of c · tanh(x / c)."""
        for i in inside:
            tensor = self._tensors[i]
            if tensor.op == "UNARY" and tensor.params[0] == _TANH:
                scales = [self._tensors[j] for j in self._readers(i) if self._tensors[j].op == "SCALE"]
                if scales:
                    return _float(scales[0], 0)
        return None

    def _activation(self, inside: list[int]) -> Facts:
        names: list[str] = []
        for tensor in self._of(inside, "GLU"):
            kind = GLU_KINDS[tensor.params[0]]
            halves = "" if len([i for i in tensor.sources if i is not None]) > 1 else ", gate and up in one product"
            more = f" (α {_float(tensor, 2):g}, limit {_float(tensor, 3):g})" if kind == "SWIGLU_OAI" else ""
            names.append(f"{kind}{more} of {tensor.ne[0].fixed}{halves}")
        plain: list[str] = []
        for i in inside:
            tensor = self._tensors[i]
            if tensor.op == "UNARY" and tensor.params[0] not in (_TANH, _SIGMOID):
                squared = any(self._tensors[j].op == "SQR" for j in self._readers(i))
                plain.append(UNARY_KINDS[tensor.params[0]] + (", squared" if squared else ""))
        return {"activation": ", ".join(dict.fromkeys([*names, *plain]))} if names or plain else {}

    def _experts(self, inside: list[int]) -> Facts:
        routed = next(self._of(inside, "MUL_MAT_ID"), None)
        if routed is None:
            return {}
        kinds = {parse(self._tensors[i].point).kind: self._tensors[i] for i in inside}
        names = {kind for i in inside for kind in self._weights(self._tensors[i])}
        stacked = routed.sources[0]
        facts: Facts = {"used": routed.ne[1].fixed, "gating": _gating(kinds)}
        if stacked is not None:
            facts["experts"] = self._tensors[stacked].ne[2].fixed
        facts["weights_normalised"] = "ffn_moe_weights_norm" in kinds
        if (scaled := kinds.get("ffn_moe_weights_scaled")) is not None:
            facts["weights_scale"] = _float(scaled, 0)
        if any(name.startswith("exp_probs_b") for name in names):
            facts["selection_bias"] = True
        if any("_shexp" in name for name in names):
            facts["shared_expert"] = "with a gate" if any("gate_inp_shexp" in name for name in names) else "without a gate"
        return {"experts": facts}

    def _states(self, inside: list[int]) -> Facts:
        facts: Facts = {}
        for tensor in self._of(inside, *_STATES):
            if tensor.op == "SSM_CONV" and tensor.sources[1] is not None:
                facts["convolution"] = f"{self._tensors[tensor.sources[1]].ne[0].fixed} positions"
            elif tensor.op != "SSM_CONV":
                facts["recurrence"] = tensor.op + self._shared_heads(tensor)
        for i in inside:
            tensor = self._tensors[i]
            if tensor.op == "CPY" and (kind := parse(tensor.point).kind):
                facts[kind] = f"state of {tensor.ne[0].fixed * tensor.ne[1].fixed} values"
        return {"states": facts} if facts else {}

    def _shared_heads(self, recurrence: Tensor) -> str:
        """How heads share what there is less of; empty where each has its own (`engine.ggml_ops` does the same)."""
        sources = [None if i is None else self._tensors[i] for i in recurrence.sources]
        if recurrence.op == "GATED_DELTA_NET" and sources[0] and sources[2]:
            fewer, heads, shared = sources[0].ne[1].fixed, sources[2].ne[1].fixed, "query and key"
            which = f"h mod {fewer}"  # they repeat in turn
        elif recurrence.op == "SSM_SCAN" and sources[1] and sources[4]:
            fewer, heads, shared = sources[4].ne[1].fixed, sources[1].ne[1].fixed, "B and C"
            which = f"of group h // {heads // fewer}"  # heads that follow one another are a group
        else:
            return ""
        if fewer == heads:
            return f", {heads} heads"
        return f", {heads} heads, " + (f"which share {shared}" if fewer == 1 else f"head h takes {shared} {which}")

    def _scales(self, inside: list[int]) -> Facts:
        capped = {j for i in inside if self._tensors[i].op == "UNARY" for j in self._readers(i)}
        lines = [
            _said_scale(self._tensors[i])
            for i in inside
            if self._tensors[i].op == "SCALE" and i not in capped and _float(self._tensors[i], 0) != 1
        ]
        return {"scales": lines} if lines else {}


def _gating(kinds: Mapping[str, Tensor]) -> str:
    """How scores of experts become weights."""
    probs = kinds.get("ffn_moe_probs")
    if probs is not None and probs.op == "SOFT_MAX":
        return "softmax before choosing"
    if probs is not None and probs.op == "UNARY":
        return UNARY_KINDS[probs.params[0]].lower()
    over_chosen = any(
        tensor.op == "SOFT_MAX" and kind not in ("kq_soft_max", "ffn_moe_probs") for kind, tensor in kinds.items()
    )
    return "softmax over the chosen" if over_chosen else "the scores as they are"


_WINDOWS: Mapping[str, str] = {
    "causal": "all earlier positions",
    "standard": "the last {size} positions, itself included",
    "chunked": "earlier positions of its own chunk of {size}",
    "symmetric": "half of {size} positions on both sides",
    "all": "every position",
}


def _said_scale(tensor: Tensor) -> str:
    bias = _float(tensor, 1)
    return f"{parse(tensor.point).kind} × {_float(tensor, 0):g}" + (f" + {bias:g}" if bias else "")
