"""A GGUF against the Hugging Face folder that it was converted from: every tensor, after the changes that converters make.

Names are mapped by gguf-py's table, which llama.cpp's converter uses. A tensor that differs from its converted source is compared
with the results of the usual mistakes. A few rows at a time are read: memory does not grow with the model.
"""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.answers.weights import DIFFERENT, EQUAL, NOT_CHECKED, FirstDifference, TensorCheck, WeightsCheck
from checkpoints.errors import InputError
from checkpoints.printable import first_names, printable
from engine.weights.gguf_model import GgufModel, TensorInfo

from .conversion_compare import Change, HeldTensor
from .conversion_forms import ConvertedModel
from .conversion_guesses import first_wrong_row, guess
from .conversion_settings import DERIVED_TENSORS, FACTOR_ROUNDING, rope_factors, settings
from .conversion_sources import TensorSource, sources_of
from .packed import Floats
from .row_distance import limit_of
from .safetensors_folder import Folder
from .stored import Stored
from .weights import Progress, type_name

_PERMUTING = frozenset(
    (
        "llama", "granite", "granitemoe", "granitehybrid", "nemotron_h", "nemotron_h_moe", "minicpm", "olmo", "internlm2",
        "xverse", "baichuan", "smollm3", "arcee", "arctic", "deci", "deepseek", "llada", "llama-embed", "nanbeige",
        "mistral3", "chameleon",
    )
)  # fmt: skip
# What converters add to the weights of norms: architectures, names, and the number. Gemma 3n and 4 multiply by w itself, and so
# does the norm after a gated delta net.
_OFFSETS = (
    (
        re.compile(r"gemma[23]?|gemma-embedding|nemotron|qwen3next|qwen35(moe)?|step35"),
        re.compile(r"(?<!\.ssm_)norm\.weight$"),
        1.0,
    ),
    (re.compile(r"plamo[23]"), re.compile(r"\.post_attention_norm(\.weight)?$"), 1.0 / 5),
    (re.compile(r"plamo[23]"), re.compile(r"\.post_ffw_norm(\.weight)?$"), 1.0 / 5**1.5),
    (re.compile(r"plamo[23]"), re.compile(r"(attn|ffn|output)_norm\.weight$"), 1.0),
    (re.compile(r"plamo3"), re.compile(r"attn_[qk]_norm\.weight$"), 1.0),
)
_DECAY = ".ssm_a"  # −exp of the folder's A_log (`MambaModel.modify_tensors`)
_EXP = 1e-13  # NMSE: exp as two libraries round it to float32, a unit in the last place of each value
_TRANSPOSED = frozenset(("gpt2", "jais"))  # keeps [in, out] (Conv1D)
_TERNARY = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight")  # `weight_quant` of conversion/bitnet.py
_BY = ("GGUF", "folder")


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # damaged scales overflow: the answer says that values differ
def check_conversion(path: Path, folder: Path, progress: Progress | None = None) -> WeightsCheck:
    """Check for each tensor of a GGUF whether it is what the folder's tensors convert to, and where config.json and metadata disagree.

    Raises:
        ModelError: the GGUF cannot be read. InputError: the folder cannot be read, or has another architecture.
    """
    model, source = GgufModel(path), Folder(folder)
    arch, heads = model.hyperparameters.architecture, (model.hyperparameters.n_heads, model.hyperparameters.n_kv_heads)
    sources, stray = sources_of(
        ConvertedModel(arch, frozenset(model.tensors), heads, source.config), model.hyperparameters.n_layers, source
    )
    if not sources.keys() & model.tensors.keys():
        raise InputError(f"{folder} has no tensor of a {arch} model.", "Is it the folder from which this GGUF was made?")
    checks: list[TensorCheck] = []
    total = sum(info.n_bytes for info in model.tensors.values())
    done = 0
    for info in model.tensors.values():
        checks.append(_check(model, info, source, sources.get(info.name, _of_weight(info.name, sources)), arch))
        done += info.n_bytes
        if progress is not None:
            progress("weights", done, total)
    missing = [name for name in sources if name not in model.tensors and not _tied(name, model, sources)]
    checks += [TensorCheck(name, "", (), "missing", reason="the folder has it, the GGUF does not") for name in missing]
    checks += list(settings(model, source))
    unread = [f"{name} ({kind})" for name, kind in source.unread.items()]
    left_out = ((f"without a place in a {arch} file", stray), ("left out, of a type that is not read", unread))
    notes = tuple(f"{why}: {first_names(names)}" for why, names in left_out if names)
    compared = [check for check in checks if check.type and check.status != NOT_CHECKED]
    if compared and not any(check.right for check in compared):
        kind = printable(str(source.config.get("model_type", "no model_type")), 40)
        notes = (f"no tensor is equal: the folder may be another model's (its config.json says {kind})", *notes)
    name = f"{model.hyperparameters.name or path.stem} ({path})"
    return WeightsCheck(name, str(folder), tuple(checks), total, notes, tolerance="what each type rounds")


def _check(model: GgufModel, info: TensorInfo, folder: Folder, source: TensorSource | None, arch: str) -> TensorCheck:
    """One tensor of the GGUF against its source."""
    factors = rope_factors(info.name, folder) if info.name in DERIVED_TENSORS else None
    if factors is not None:
        return _factors(model, info, factors)
    if source is not None and arch == "bitnet" and _TERNARY.fullmatch(info.name):
        reason = "converters round it to −1, 0 and 1 times the mean of its absolute values, which is not computed here"
        return TensorCheck(info.name, type_name(info.type), info.shape, NOT_CHECKED, 0, (), reason)
    return _tensor(model, info, source, arch, _heads_of_layer(model, info.name), folder.refusal)


def _of_weight(name: str, sources: dict[str, TensorSource]) -> TensorSource | None:
    """The source of the weight that a tensor of scales belongs to, if that is not readable: then the scales are not either."""
    base, _, kind = name.rpartition(".")
    weight = sources.get(f"{base}.weight") if kind in ("scale", "input_scale") else None
    return None if weight is None or weight.readable else weight


def _heads_of_layer(model: GgufModel, name: str) -> tuple[int, int]:
    """The numbers of heads and of key/value heads of the layer that a tensor belongs to: some models have another one in each."""
    layer = re.match(r"blk\.(\d+)\.", name)
    counts = [model.hyperparameters.n_heads, model.hyperparameters.n_kv_heads]
    for i, key in enumerate(("head_count", "head_count_kv")):
        held = model.array(f"{model.hyperparameters.architecture}.attention.{key}")
        if held and layer and int(layer[1]) < len(held):
            counts[i] = int(held[int(layer[1])])
    return counts[0], counts[1]


def _tied(name: str, model: GgufModel, sources: dict[str, TensorSource]) -> bool:
    """Whether a GGUF rightly lacks the output matrix: it is the embedding's, which is stored once."""
    if name != "output.weight" or "token_embd.weight" not in sources or "token_embd.weight" not in model.tensors:
        return False
    if not (sources[name].readable and sources["token_embd.weight"].readable):
        return False
    a, b = sources[name].parts[0], sources["token_embd.weight"].parts[0]
    return a.shape == b.shape and all(
        np.array_equal(a.part(slice(start, start + 1024)), b.part(slice(start, start + 1024)))
        for start in range(0, a.shape[0], 1024)
    )


def _tensor(
    model: GgufModel, info: TensorInfo, source: TensorSource | None, arch: str, heads: tuple[int, int], refusal: str
) -> TensorCheck:
    kind, count = type_name(info.type), int(np.prod(info.shape))
    if source is None or not source.readable or source.size != count:
        status, by, reason = _incomparable(info.name, source, refusal)
        return TensorCheck(info.name, kind, info.shape, status, 0, by, reason)
    stored, source = source, source.shaped(info.shape)
    conv1d = arch in _TRANSPOSED and len(info.shape) == 2 and info.name.startswith("blk.")
    if conv1d:
        source = source.turned()
    kept = np.float16 if all(part.array.dtype == np.float16 for part in source.parts) else np.float32
    right = _expected(info, arch, heads, kept)
    count_of = _heads(info, heads)
    held = HeldTensor(model, info, info.shape[0] // count_of if count_of and len(info.shape) == 2 else 1)
    distance = held.distance(source, right)
    limit = limit_of(info.type, _EXP if info.name.endswith(_DECAY) else 0.0)
    if limit.holds(distance):
        status = EQUAL if distance is not None and not distance.errors.any() else f"{EQUAL} as {kind}"
        return TensorCheck(info.name, kind, info.shape, status, count, _BY)
    wrong = [] if distance is None else limit.wrong_rows(distance).tolist()
    first = held.first(source, right, wrong[0] if wrong else 0)
    joined = ((mistake, TensorSource(parts).shaped(info.shape), right) for mistake, parts in stored.mistakes)
    scaled = ((mistake, TensorSource(parts), right) for mistake, parts in _mistaken_scales(source))
    changed = ((mistake, source, change) for mistake, change in _mistakes(info, arch, heads))
    for mistake, other, change in chain(joined, scaled, changed):
        if limit.holds(held.distance(other, change)):
            return TensorCheck(info.name, kind, info.shape, mistake, count, _BY, mistake, first)
    if mistake := guess(held, source, right, limit):
        status = DIFFERENT if mistake.startswith("it is exchanged") else mistake
        return TensorCheck(info.name, kind, info.shape, status, count, _BY, mistake, first)
    reason = "nothing known gives these values"
    if distance is not None:
        row = first_wrong_row(held, source, right, limit, wrong[0]) if wrong else ""
        reason = limit.excess(distance, row or reason)
    return TensorCheck(info.name, kind, info.shape, DIFFERENT, count, _BY, reason, first)


def _incomparable(name: str, source: TensorSource | None, refusal: str) -> tuple[str, tuple[str, ...], str]:
    """Status, what was compared, and the reason for a tensor whose values the folder does not have, or not as many of them.

    `refusal` is why the folder's values cannot be read, if they cannot.
    """
    if source is None and name in DERIVED_TENSORS:
        return NOT_CHECKED, (), "no tensor of the folder, and config.json does not give it: the converter made it"
    if source is None and name == "output.weight":
        return NOT_CHECKED, (), "no tensor of the folder: the converter made it"
    if source is None:
        return "extra", (), "the folder has no such tensor"
    if not source.readable:
        return NOT_CHECKED, (), refusal
    shapes = " + ".join(str(list(part.shape)) for part in source.parts[:2])
    return DIFFERENT, _BY, f"{source.size:,} values in the folder, {shapes}"


def _factors(model: GgufModel, info: TensorInfo, right: Floats) -> TensorCheck:
    """RoPE's factors against those that config.json gives."""
    kind, held = type_name(info.type), model.load(info.name).reshape(-1)
    if held.shape == right.shape and np.allclose(held, right, rtol=FACTOR_ROUNDING, atol=0):
        return TensorCheck(info.name, kind, info.shape, EQUAL, len(held), _BY)
    if held.shape != right.shape:
        return TensorCheck(info.name, kind, info.shape, DIFFERENT, 0, _BY, f"config.json gives {len(right)} factors")
    at = int(np.argmax(np.abs(held - right) > FACTOR_ROUNDING * np.abs(right)))
    first = FirstDifference(at, at, "", {"GGUF": float(held[at]), "folder": float(right[at])})
    reason = (
        "1 / the factors that config.json gives"
        if np.allclose(held * right, 1, rtol=FACTOR_ROUNDING)
        else "other factors than config.json gives"
    )
    return TensorCheck(info.name, kind, info.shape, DIFFERENT, len(held), _BY, reason, first)


def _heads(info: TensorInfo, heads: tuple[int, int]) -> int:
    """The number of heads whose rows a tensor consists of, 0 if it does not, or if so many heads cannot be cut into halves."""
    count = heads[0] if ".attn_q." in info.name else heads[1] if ".attn_k." in info.name else 0
    return count if count > 0 and info.shape[0] % (2 * count) == 0 else 0


def _offset(name: str, arch: str) -> float:
    """What a converter adds to a norm's weight."""
    return next((number for archs, names, number in _OFFSETS if archs.fullmatch(arch) and names.search(name)), 0.0)


def _expected(info: TensorInfo, arch: str, heads: tuple[int, int], kept: type[np.floating[Any]]) -> Change:
    """What a converter makes of the folder's rows; it computes in float32, or in float16 what is `kept` so."""
    if arch in _PERMUTING and _heads(info, heads):
        return lambda rows: permuted(rows, info.shape, _heads(info, heads))
    if offset := _offset(info.name, arch):
        return lambda rows: (rows.astype(kept) + kept(offset)).astype(np.float32)
    if info.name.endswith(_DECAY):
        return lambda rows: -np.exp(rows).astype(kept).astype(np.float32)
    return lambda rows: rows


def _mistaken_scales(source: TensorSource) -> Iterator[tuple[str, tuple[Stored, ...]]]:
    """What mistakes with the scales of packed weights would have given: the same one in each part."""
    for together in zip(*(part.mistakes() for part in source.parts), strict=False):
        yield together[0][0], tuple(part for _, part in together)


def _mistakes(info: TensorInfo, arch: str, heads: tuple[int, int]) -> Iterator[tuple[str, Change]]:
    """Mistakes that a converter may have made, each with its effect."""
    if n := _heads(info, heads):
        if arch in _PERMUTING:
            yield "not permuted: llama.cpp rotates neighbours here, the folder's rows are halves", lambda rows: rows
            other = heads[1] if n == heads[0] else heads[0]
            if other > 0 and info.shape[0] % (2 * other) == 0 and other != n:
                yield f"permuted by {other} heads instead of {n}", lambda rows: permuted(rows, info.shape, other)
        else:
            yield "permuted, which this architecture's rows are not", lambda rows: permuted(rows, info.shape, n)
    if info.name.endswith(_DECAY):
        yield "the logarithm of the decay, of which llama.cpp expects −exp", lambda rows: rows
    if info.name.removesuffix(".weight").endswith("norm"):
        if offset := _offset(info.name, arch):
            yield f"without the {offset:.4g} that llama.cpp expects in this norm's weight", lambda rows: rows
            if offset != 1:
                yield f"with 1 added instead of {offset:.4g}", lambda rows: rows + np.float32(1)
        else:
            yield "with 1 added, which this architecture's norm does not expect", lambda rows: rows + np.float32(1)


def permuted(rows: Floats, shape: tuple[int, ...], heads: int) -> Floats:
    """Each head's rows reordered from halves to neighbours: `LlamaModel.permute` of convert_hf_to_gguf.py. For a bias, its elements."""
    head = shape[0] // heads
    grid = rows.reshape(-1, 2, head // 2, rows.shape[-1] if len(shape) > 1 else 1)
    return np.ascontiguousarray(grid.swapaxes(1, 2)).reshape(rows.shape)
