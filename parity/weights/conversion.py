"""A GGUF against the Hugging Face folder that it was converted from: every tensor, after the changes that converters make.

Names are mapped by gguf-py's table, which llama.cpp's converter uses. A tensor that differs from its converted source is compared
with the results of the usual mistakes. A few rows at a time are read: memory does not grow with the model.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.weights import DIFFERENT, EQUAL, NOT_CHECKED, FirstDifference, TensorCheck, WeightsCheck
from checkpoints.errors import InputError
from engine.weights.dequantize import dequantize
from engine.weights.gguf_model import GgufModel, TensorInfo

from .conversion_settings import FACTOR_ROUNDING, MADE, rope_factors, settings
from .quantisation_loss import largest_loss
from .safetensors_folder import Floats, Folder, Stored
from .weights import Progress, type_name

# A type of 16 bits rounds: half a step of bfloat16's 8 bits is 2^-9.
_ROUNDED = 2.0**-17
_CHUNK = 1 << 22  # elements that are read at a time
_PERMUTING = frozenset(
    ("llama", "granite", "granitemoe", "minicpm", "olmo", "internlm2", "xverse", "baichuan", "smollm3", "arcee")
)
_OFFSET = re.compile(r"gemma\d*(-embedding)?|nemotron")  # converters store 1 + w of their norms
_GROUPED = frozenset(("falcon", "gptneox", "bloom"))  # keep queries, keys and values of a head, or of a group, side by side
_DECAY = ".ssm_a"  # −exp of the folder's A_log (`MambaModel.modify_tensors`)
_EXP = 1e-13  # NMSE: exp as two libraries round it to float32, a unit in the last place of each value
_TRANSPOSED = frozenset(("gpt2",))  # keeps [in, out] (Conv1D)
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_BY = ("GGUF", "folder")


class _Source(Struct, frozen=True):
    """Where a tensor of the GGUF comes from: one tensor, or one for each expert.

    `in_groups`: a fused projection as the folder stores it, from which `parts` is reordered.
    """

    parts: tuple[Stored, ...]
    names: tuple[str, ...]
    in_groups: "_Source | None" = None

    def rows(self, start: int, stop: int, per_part: int, *, transposed: bool = False) -> Floats:
        """Rows [start, stop) of the concatenated parts; they must lie in one part."""
        part = self.parts[start // per_part]
        first = start % per_part
        if len(part.shape) == 1:
            return part.part()[None]
        if transposed:
            return np.ascontiguousarray(part.part((slice(None), slice(first, first + stop - start))).T)
        if len(part.shape) == 3:  # experts that are stacked already
            rows = part.shape[1]
            return part.part((start // rows, slice(start % rows, start % rows + stop - start)))
        return part.part(slice(first, first + stop - start))


Change = Callable[[Floats], Floats]


def check_conversion(path: Path, folder: Path, progress: Progress | None = None) -> WeightsCheck:
    """Check for each tensor of a GGUF whether it is what the folder's tensors convert to, and where config.json and metadata disagree.

    Raises:
        ModelError: the GGUF cannot be read. InputError: the folder cannot be read, or has another architecture.
    """
    model, source = GgufModel(path), Folder(folder)
    arch, heads = model.hyperparameters.architecture, (model.hyperparameters.n_heads, model.hyperparameters.n_kv_heads)
    sources, stray = _sources(arch, model.hyperparameters.n_layers, source)
    if arch in _GROUPED:
        sources = {name: _ungrouped(of, heads) if ".attn_qkv." in name else of for name, of in sources.items()}
    if not sources.keys() & model.tensors.keys():
        raise InputError(f"{folder} has no tensor of a {arch} model.", "Is it the folder from which this GGUF was made?")
    checks: list[TensorCheck] = []
    total = sum(info.n_bytes for info in model.tensors.values())
    done = 0
    for info in model.tensors.values():
        factors = rope_factors(info.name, source) if info.name in MADE else None
        checks.append(
            _factors(model, info, factors) if factors is not None else _tensor(model, info, sources.get(info.name), arch, heads)
        )
        done += info.n_bytes
        if progress is not None:
            progress("weights", done, total)
    missing = [name for name in sources if name not in model.tensors and not _tied(name, model, sources)]
    checks += [TensorCheck(name, "", (), "missing", reason="the folder has it, the GGUF does not") for name in missing]
    checks += list(settings(model, source))
    notes = (f"without a place in a {arch} file: {', '.join(stray[:4])}{', …' * (len(stray) > 4)}",) if stray else ()
    name = f"{model.hyperparameters.name or path.stem} ({path})"
    return WeightsCheck(name, str(folder), tuple(checks), total, notes, tolerance="what each type rounds")


def _sources(arch: str, layers: int, folder: Folder) -> tuple[dict[str, _Source], list[str]]:
    """The source of each GGUF tensor by its name, and the folder's tensors from which none is made."""
    import gguf

    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    if kind is None:
        raise InputError(f"gguf-py has no names of the architecture {arch}.", "Conversion cannot be checked for it.")
    names = gguf.get_tensor_name_map(kind, layers)
    sources: dict[str, _Source] = {}
    experts: dict[str, dict[int, str]] = {}
    stray: list[str] = []
    for name, stored in folder.tensors.items():
        if match := _EXPERT.fullmatch(name):
            head = match[1].replace("block_sparse_moe", "mlp")
            experts.setdefault(f"{head}.experts.{_MIXTRAL.get(match[3], match[3])}.weight", {})[int(match[2])] = name
            continue
        plain = name.replace("model.language_model.", "model.")
        # As the converters of BLOOM and Mamba 2 change them.
        spellings = (plain, plain.removeprefix("transformer."), plain.replace(".dt_bias", ".dt_proj.bias"))
        to = next(filter(None, (names.get_name(text, try_suffixes=(".weight", ".bias")) for text in spellings)), None)
        if to is None:
            stray.append(name)
        else:
            sources[to] = _Source((stored,), (name,))
    for joined, members in experts.items():
        to = names.get_name(joined, try_suffixes=(".weight",))
        if to is None or sorted(members) != list(range(len(members))):
            stray += members.values()
            continue
        ordered = tuple(members[number] for number in range(len(members)))
        sources[to] = _Source(tuple(folder.tensors[name] for name in ordered), ordered)
    return sources, stray


def _ungrouped(source: _Source, heads: tuple[int, int]) -> _Source:
    """A fused projection whose rows are grouped (queries, then a key head and a value head for each group), reordered to all queries,
    keys, values: `FalconModel.modify_tensors` of convert_hf_to_gguf.py. The result has a part for each head.
    """
    (whole,), (many, few) = source.parts, heads
    group = many // few + 2 if few else 0
    count = few * group
    if not count or many % few or whole.shape[0] % count:
        return source
    rows = whole.shape[0] // count
    size = len(whole.raw) // count
    cut = [Stored(whole.raw[i * size : (i + 1) * size], whole.dtype, (rows, *whole.shape[1:])) for i in range(count)]
    places = [i for i in range(count) if i % group < group - 2]
    places += [*range(group - 2, count, group), *range(group - 1, count, group)]
    if len(whole.shape) == 1:  # a bias
        together = Stored(np.concatenate([cut[i].raw for i in places]), whole.dtype, whole.shape)
        return _Source((together,), source.names, source)
    return _Source(tuple(cut[i] for i in places), source.names, source)


def _shaped(source: _Source, shape: tuple[int, ...]) -> _Source:
    """A tensor in the GGUF's shape if the two differ only in dimensions of 1: the kernels of convolutions, [n, 1, k] in PyTorch."""
    part = source.parts[0]
    if len(source.parts) > 1 or part.shape == shape or [n for n in part.shape if n > 1] != [n for n in shape if n > 1]:
        return source
    return replace(source, parts=(Stored(part.raw, part.dtype, shape),))


def _tied(name: str, model: GgufModel, sources: dict[str, _Source]) -> bool:
    """Whether a GGUF rightly lacks the output matrix: it is the embedding's, which is stored once."""
    if name != "output.weight" or "token_embd.weight" not in sources or "token_embd.weight" not in model.tensors:
        return False
    a, b = sources[name].parts[0], sources["token_embd.weight"].parts[0]
    return a.shape == b.shape and all(
        np.array_equal(a.part(slice(start, start + 1024)), b.part(slice(start, start + 1024)))
        for start in range(0, a.shape[0], 1024)
    )


def _tensor(model: GgufModel, info: TensorInfo, source: _Source | None, arch: str, heads: tuple[int, int]) -> TensorCheck:
    kind, count = type_name(info.type), int(np.prod(info.shape))
    if source is None:
        if info.name in MADE or info.name == "output.weight":
            reason = (
                "no tensor of the folder, and config.json does not give it" if info.name in MADE else "no tensor of the folder"
            )
            return TensorCheck(info.name, kind, info.shape, NOT_CHECKED, 0, (), f"{reason}: the converter made it")
        return TensorCheck(info.name, kind, info.shape, "extra", 0, (), "the folder has no such tensor")
    source = _shaped(source, info.shape)
    size = sum(int(np.prod(part.shape)) for part in source.parts)
    if size != count:
        shapes = " + ".join(str(list(part.shape)) for part in source.parts[:2])
        return TensorCheck(info.name, kind, info.shape, DIFFERENT, 0, _BY, f"{size:,} values in the folder, {shapes}")
    right = _expected(info, arch, heads)
    error, first = _compare(model, info, source, right, heads, arch)
    exactly = _EXP if info.name.endswith(_DECAY) else 0.0
    limit = exactly if info.type == 0 else _ROUNDED if info.type in (1, 30) else largest_loss(info.type)
    if error <= limit:
        status = EQUAL if error == 0 else f"{EQUAL} as {kind}"
        return TensorCheck(info.name, kind, info.shape, status, count, _BY)
    if source.in_groups is not None and _compare(model, info, source.in_groups, right, heads, arch)[0] <= limit:
        mistake = "left in groups: llama.cpp expects all queries, then all keys, then all values"
        return TensorCheck(info.name, kind, info.shape, mistake, count, _BY, mistake, first)
    for mistake, change in _mistakes(info, arch, heads):
        if _compare(model, info, source, change, heads, arch)[0] <= limit:
            return TensorCheck(info.name, kind, info.shape, mistake, count, _BY, mistake, first)
    if other := _other(model, info, source, right, heads, arch, limit):
        mistake = f"it is {other}"
        return TensorCheck(info.name, kind, info.shape, DIFFERENT, count, _BY, mistake, first)
    reason = f"nothing known gives these values (NMSE {error:.1e})"
    return TensorCheck(info.name, kind, info.shape, DIFFERENT, count, _BY, reason, first)


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


def _heads(name: str, heads: tuple[int, int]) -> int:
    """The number of heads whose rows a tensor consists of, 0 if it does not."""
    return heads[0] if ".attn_q." in name else heads[1] if ".attn_k." in name else 0


def _expected(info: TensorInfo, arch: str, heads: tuple[int, int]) -> Change:
    if arch in _PERMUTING and _heads(info.name, heads):
        return lambda rows: permuted(rows, info.shape, _heads(info.name, heads))
    if _OFFSET.fullmatch(arch) and info.name.endswith("norm.weight"):
        return lambda rows: rows + np.float32(1)
    if info.name.endswith(_DECAY):
        return lambda rows: -np.exp(rows)
    return lambda rows: rows


def _mistakes(info: TensorInfo, arch: str, heads: tuple[int, int]) -> Iterator[tuple[str, Change]]:
    """Mistakes that a converter may have made, each with its effect."""
    if n := _heads(info.name, heads):
        if arch in _PERMUTING:
            yield "not permuted: llama.cpp rotates neighbours here, the folder's rows are halves", lambda rows: rows
            other = heads[1] if n == heads[0] else heads[0]
            if info.shape[0] % (2 * other) == 0 and other != n:
                yield f"permuted by {other} heads instead of {n}", lambda rows: permuted(rows, info.shape, other)
        else:
            yield "permuted, which this architecture's rows are not", lambda rows: permuted(rows, info.shape, n)
    if info.name.endswith(_DECAY):
        yield "the logarithm of the decay, of which llama.cpp expects −exp", lambda rows: rows
    if info.name.endswith("norm.weight"):
        if _OFFSET.fullmatch(arch):
            yield "without the 1 that llama.cpp expects in this norm's weight", lambda rows: rows
        else:
            yield "with 1 added, which this architecture's norm does not expect", lambda rows: rows + np.float32(1)


def permuted(rows: Floats, shape: tuple[int, ...], heads: int) -> Floats:
    """Each head's rows reordered from halves to neighbours: `LlamaModel.permute` of convert_hf_to_gguf.py. For a bias, its elements."""
    head = shape[0] // heads
    grid = rows.reshape(-1, 2, head // 2, rows.shape[-1] if len(shape) > 1 else 1)
    return np.ascontiguousarray(grid.swapaxes(1, 2)).reshape(rows.shape)


def _other(
    model: GgufModel, info: TensorInfo, source: _Source, right: Change, heads: tuple[int, int], arch: str, limit: float
) -> str:
    """The name of the GGUF tensor with the same shape and layer that has these values, "" if there is none."""
    layer = info.name.rsplit(".", 2)[0]
    for name, other in model.tensors.items():
        if name == info.name or other.shape != info.shape or not name.startswith(layer):
            continue
        if _compare(model, other, source, right, heads, arch)[0] <= limit:
            return f"exchanged: its values are in {name}"
    return ""


def _compare(
    model: GgufModel, info: TensorInfo, source: _Source, change: Change, heads: tuple[int, int], arch: str
) -> tuple[float, FirstDifference | None]:
    """NMSE of a tensor against its source, and the first element that is off by more than a hundredth of its row's size."""
    raw = model.raw(info.name)
    rows, columns = len(raw), info.shape[-1]
    per_part = rows // len(source.parts)
    turned = arch in _TRANSPOSED and len(info.shape) == 2 and info.name.startswith("blk.")  # Conv1D keeps [in, out]
    unit = info.shape[0] // _heads(info.name, heads) if _heads(info.name, heads) and len(info.shape) == 2 else 1
    step = max(unit, _CHUNK // columns // unit * unit)
    error = energy = 0.0
    first: FirstDifference | None = None
    for part in range(0, rows, per_part):
        for start in range(part, part + per_part, step):
            stop = min(start + step, part + per_part)
            held = dequantize(raw[start:stop], info.type, columns).astype(np.float64)
            wanted = change(source.rows(start, stop, per_part, transposed=turned)).astype(np.float64)
            if wanted.shape != held.shape:
                return np.inf, None
            error += float(((held - wanted) ** 2).sum())
            energy += float((wanted**2).sum())
            if first is None:
                first = _first(held, wanted, start, columns, info)
    return error / energy if energy else (0.0 if error == 0 else np.inf), first


def _first(
    held: NDArray[np.float64], wanted: NDArray[np.float64], start: int, columns: int, info: TensorInfo
) -> FirstDifference | None:
    size = np.sqrt((wanted**2).mean(axis=1, keepdims=True))
    off = np.abs(held - wanted) > (
        0.01 * size if info.type not in (0, 1, 30) else 2.0**-8 * np.abs(wanted) if info.type else 0.0
    )
    if not off.any():
        return None
    at = int(off.argmax())
    row, column = divmod(at, columns)
    values = {"GGUF": float(held[row, column]), "folder": float(wanted[row, column])}
    return FirstDifference((start + row) * columns + column, start + row, "", values)
