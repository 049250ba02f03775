"""Which tensors of a Hugging Face folder belong together as packed weights and their scales, by the method that config.json names.

Mirrors `dequant_model` of llama.cpp's converter (conversion/base.py).
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .packed import E4M3, E8M0, TABLES, Floats, FourBits, Gptq, Grouped, Packed, Rows, Scaled, Ternary
from .stored import Stored

Tensors = dict[str, Stored]
SCALE = "scale"  # the kind of a number that a GGUF keeps beside a weight, unless it is 1
_UNUSED = (
    ".activation_scale",
    "_activation_scale",
    ".qscale_act",
    ".input_scale",
    ".k_scale",
    ".v_scale",
    ".input_global_scale",
)
_LEFT_PACKED = ("_packed", "_blocks")  # endings of packed weights under another name than the weight's
# What may stand beside a packed weight: scales, zero points, the order and shape of groups, tables.
_BESIDE = re.compile(r"\w*(?:scale|zero|g_idx|shape|absmax|quant_)[\w.]*")
_ZEROS_LESS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what was taken from the stored zero points
_Made = tuple[Tensors, tuple[str, ...]]  # tensors by their names, and the names of those that they were made of


def unpacked(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The tensors, those with scales of their own under the names of weights, with values that are computed when they are read.

    What has another shape than its method says, or a method that is not known, stays as it is: not readable.
    """
    settings = _settings(config)
    method = settings.get("quant_method")
    known = _METHODS.get(method) if isinstance(method, str) else None
    readable = dict(tensors)
    for name in tensors:
        for ending, convert in (known or {}).items():
            if name.endswith(ending):
                try:
                    weights, used = convert(name.removesuffix(ending), tensors, settings)
                except (KeyError, ValueError, IndexError, TypeError, OverflowError, ZeroDivisionError, AttributeError):
                    continue  # not as the method has them
                for part in used:
                    readable.pop(part, None)
                readable |= weights
    if method:
        readable = {name: stored for name, stored in readable.items() if stored.kind == SCALE or not name.endswith(_UNUSED)}
    if not method or known:
        plain = {name: stored for name, stored in readable.items() if stored.kind in TABLES and stored.array.size}
        readable |= {name: _unscaled(stored) for name, stored in plain.items() if not _has_scale(name, readable)}
    return _with_unread_whole(readable)


def _with_unread_whole(readable: Tensors) -> Tensors:
    """Without what stands beside packed weights that no method read: those are one unreadable tensor each, by the weight's name."""
    renamed = dict(readable)
    for name in [name for name, stored in readable.items() if name.endswith(_LEFT_PACKED) and not stored.readable]:
        renamed[name.rpartition("_")[0]] = renamed.pop(name)
    unread = {name for name, stored in renamed.items() if not stored.readable}
    unread |= {name.rpartition(".")[0] for name in unread if name.endswith(("weight", ".qweight"))}

    def beside(name: str) -> bool:
        ends = (i for i, letter in enumerate(name) if letter in "._")
        return any(name[:i] in unread and _BESIDE.fullmatch(name, i + 1) for i in ends)

    return {name: stored for name, stored in renamed.items() if not beside(name)}


def _has_scale(name: str, tensors: Tensors) -> bool:
    """Whether a scale stands beside a tensor that no method applied to it."""
    return any(f"{name}{ending}" in tensors for ending in ("_scale", "_scale_inv"))


def refusal(config: dict[str, Any]) -> str:
    """Why packed weights are not read, for a person."""
    settings = _settings(config)
    method, form = settings.get("quant_method"), settings.get("checkpoint_format")
    form = f" in the format {form[:40]!r}" if method == "gptq" and isinstance(form, str) and form not in _ZEROS_LESS else ""
    if isinstance(method, str) and method and (form or method not in _METHODS):
        return f"the folder keeps it quantised by {method[:40]}{form}, which is not read: use the folder before quantisation"
    return "the folder keeps it in a type with scales of its own (8 bits, or packed), in a form that is not read"


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    settings = config.get("quantization_config")
    return settings if isinstance(settings, dict) else {}


def _stored(shape: tuple[int, ...], source: Rows) -> Stored:
    packed = Packed(shape, source)
    return Stored(packed.places, packed=packed)


def _unscaled(stored: Stored) -> Stored:
    """Floats of 8 bits without a scale."""
    return _scaled(stored, np.ones(1, np.float32), None)


def _numbers(stored: Stored) -> Floats:
    """Scales, of any type of floats."""
    if stored.kind in TABLES:
        return TABLES[stored.kind][stored.array]
    if not stored.readable:
        raise ValueError("scales that are no floats")
    return stored.part()


def _scaled(weight: Stored, scale: Floats, block: tuple[int, int] | None) -> Stored:
    """`dequant_simple`: a scale for the whole, for each row, or for each block of the last two axes."""
    shape = weight.array.shape
    rows, columns = (1, *shape)[-2:]
    if block is None:
        scale = scale.reshape(scale.shape + (1,) * (2 + len(shape[:-2]) - scale.ndim))
        scale = np.broadcast_to(scale, (*shape[:-2], *scale.shape[-2:]))
        block = (rows if scale.shape[-2] == 1 else 1, columns if scale.shape[-1] == 1 else 1)
    wanted = (*shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if scale.shape != wanted or (weight.kind not in TABLES and weight.kind != "I8"):
        raise ValueError("codes or scales of another kind")
    matrices = scale.reshape(-1, *wanted[-2:])
    return _stored(shape, Scaled(weight.array.reshape(-1, columns), TABLES.get(weight.kind), matrices, rows, block))


def _block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    height, width = map(int, value)
    if height < 1 or width < 1:
        raise ValueError("blocks without values")
    return height, width


def _fp8(base: str, tensors: Tensors, settings: dict[str, Any]) -> _Made:
    """Floats of 8 bits times `…_scale_inv`, in blocks of `weight_block_size`."""
    scale = f"{base}_scale_inv"
    return {base: _scaled(tensors[base], _numbers(tensors[scale]), _block(settings.get("weight_block_size")))}, (scale,)


def _mistral(base: str, tensors: Tensors, settings: dict[str, Any]) -> _Made:
    """As Mistral names them."""
    block, scale = _block(settings.get("weight_block_size")), f"{base}qscale_weight"
    return {f"{base}weight": _scaled(tensors[f"{base}weight"], _numbers(tensors[scale]), block)}, (scale,)


def _compressed(base: str, tensors: Tensors, settings: dict[str, Any]) -> _Made:
    """compressed-tensors, a scale for each row or block."""
    scale, block = f"{base}_scale", _block(_group(settings).get("block_structure"))
    return {base: _scaled(tensors[base], _numbers(tensors[scale]), block)}, (scale,)


def _group(settings: dict[str, Any]) -> dict[str, Any]:
    """What the only group of a compressed-tensors configuration says of the weights."""
    (group,) = settings["config_groups"].values()
    return dict(group["weights"])


def _pairs(weight: Stored, scales: Stored, table: Floats, group: int) -> Stored:
    """4-bit floats in pairs, [rows, columns / 2] or in blocks [rows, groups, group / 2], after any number of leading axes."""
    *head, groups = scales.array.shape
    if not all(part.array.dtype == np.uint8 for part in (weight, scales)) or weight.array.size * 2 != scales.array.size * group:
        raise ValueError("scales that do not belong to the weights")
    codes = weight.array.reshape(-1, groups * group // 2)
    return _stored((*head, groups * group), FourBits(codes, scales.array.reshape(-1, groups), table))


def _mxfp4(base: str, tensors: Tensors, settings: dict[str, Any]) -> _Made:
    """gpt-oss' experts: blocks [experts, out, groups, 16], as the tensor [experts, in, out] that they are made from."""
    names = (f"{base}_blocks", f"{base}_scales")
    weights = _pairs(tensors[names[0]], tensors[names[1]], E8M0, 32)
    return {base: weights.view(weights.array.swapaxes(-1, -2))}, names


def _packed(base: str, tensors: Tensors, settings: dict[str, Any]) -> _Made:
    """compressed-tensors' packed whole numbers or 4-bit floats."""
    names = tuple(f"{base}_{part}" for part in ("packed", "scale", "shape", "zero_point"))
    weight, scale = tensors[names[0]], tensors[names[1]]
    if weight.array.dtype == np.uint8:
        if scale.kind == "U8":
            return {base: _pairs(weight, scale, E8M0, 32)}, names[:2]
        return _nvfp4(base, tensors, weight, "_global_scale", inverse=True)
    group = _group(settings)
    bits, size = int(group["num_bits"]), int(group["group_size"])
    rows, columns = tensors[names[2]].array.tolist()
    zeros = tensors[names[3]].array if names[3] in tensors else None
    each = len(range(0, 32 - (bits - 1), bits))
    groups = columns // size
    if (
        weight.array.dtype != np.int32
        or weight.array.shape != (rows, -(-columns // each))
        or columns % size
        or scale.array.shape != (rows, groups)
        or (zeros is not None and (zeros.dtype != np.int32 or zeros.shape != (-(-rows // each), groups)))
    ):
        raise ValueError("packed weights of another shape than their settings")
    return {base: _stored((rows, columns), Grouped(weight.array, _numbers(scale), zeros, bits, size, columns))}, names


def _gptq(base: str, tensors: Tensors, settings: dict[str, Any]) -> _Made:
    names = tuple(f"{base}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    weight, zeros, scales, groups = (tensors[name] for name in names)
    bits = int(settings["bits"])
    (inputs,), (_, outputs) = groups.array.shape, weight.array.shape
    each = 32 // bits
    if (
        bits not in (2, 4, 8)
        or any(stored.array.dtype != np.int32 for stored in (weight, zeros, groups))
        or weight.array.shape[0] * each != inputs
        or scales.array.shape[1:] != (outputs,)
        or zeros.array.shape != (len(scales.array), outputs // each)
        or not 0 <= int(groups.array.min()) <= int(groups.array.max()) < len(scales.array)
    ):
        raise ValueError("packed weights of another shape than their settings")
    offset = _ZEROS_LESS[settings.get("checkpoint_format", "gptq")]
    source = Gptq(weight.array, zeros.array, _numbers(scales), groups.array, bits, offset)
    return {f"{base}.weight": _stored((outputs, inputs), source)}, names


def _bitnet(base: str, tensors: Tensors, settings: dict[str, Any]) -> _Made:
    codes, (scale,) = tensors[base].array, _numbers(tensors[f"{base}_scale"]).reshape(-1)
    if codes.dtype != np.uint8 or codes.ndim != 2 or not scale:
        raise ValueError("codes of another type")
    return {base: _stored((4 * codes.shape[0], codes.shape[1]), Ternary(codes, scale))}, (f"{base}_scale",)


def _modelopt(base: str, tensors: Tensors, settings: dict[str, Any]) -> _Made:
    """Floats of 8 bits, or of 4 bits."""
    scale = tensors[f"{base}_scale"]
    if scale.array.ndim == 2 and tensors[base].kind == "U8":
        return _nvfp4(base, tensors, tensors[base], "_scale_2", inverse=False)
    return {base: _scaled(tensors[base], _numbers(scale), None)}, (f"{base}_scale",)


def _nvfp4(base: str, tensors: Tensors, weight: Stored, whole: str, *, inverse: bool) -> _Made:
    """Floats of 4 bits with a scale for each sixteen, and scales of the whole and of its input, which a GGUF keeps beside it.

    compressed-tensors names and stores the latter otherwise: as what is divided by.
    """
    module = base.removesuffix(".weight")
    names = (f"{base}{whole}", f"{module}.input{'_global' * inverse}_scale")
    weights = {base: _pairs(weight, tensors[f"{base}_scale"], np.abs(E4M3), 16)}
    for name, kind in zip(names, (".scale", ".input_scale"), strict=True):
        number = _numbers(tensors[name]).reshape(-1)[[0]] if name in tensors else np.ones(1, np.float32)
        weights[module + kind] = Stored(np.asarray(1 / number if inverse else number, np.float32), SCALE)
    return weights, (f"{base}_scale", f"{base}_packed", *names)


_METHODS: dict[str, dict[str, Callable[[str, Tensors, dict[str, Any]], _Made]]] = {
    "fp8": {"_scale_inv": _fp8, "qscale_weight": _mistral},
    "compressed-tensors": {"_scale": _compressed, "_packed": _packed},
    "mxfp4": {"_blocks": _mxfp4},
    "gptq": {".qweight": _gptq},
    "bitnet": {"_scale": _bitnet},
    "modelopt": {"_scale": _modelopt},
}
