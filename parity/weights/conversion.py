"""A GGUF against the Hugging Face folder that it was converted from: every tensor, after the changes that converters make.

Names are mapped by gguf-py's table, which llama.cpp's converter uses. A tensor that differs from its converted source is compared
with the results of the usual mistakes. A few rows at a time are read: memory does not grow with the model.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.weights import DIFFERENT, EQUAL, NOT_CHECKED, FirstDifference, TensorCheck, WeightsCheck
from checkpoints.errors import InputError
from engine.weights.dequantize import dequantize
from engine.weights.gguf_model import GgufModel, TensorInfo

from .conversion_settings import DERIVED_TENSORS, FACTOR_ROUNDING, rope_factors, settings
from .conversion_sources import TensorSource, shaped, sources_of, ungrouped
from .row_distance import Distance, Limit, limit_of
from .safetensors_folder import Floats, Folder
from .weights import Progress, type_name

_CHUNK = 1 << 18  # elements that are read at a time: what is computed from them stays in the cache (1 MB as float32)
_PERMUTING = frozenset(
    ("llama", "granite", "granitemoe", "minicpm", "olmo", "internlm2", "xverse", "baichuan", "smollm3", "arcee")
)
_OFFSET = re.compile(r"gemma\d*(-embedding)?|nemotron")  # converters store 1 + w of their norms
_GROUPED = frozenset(("falcon", "gptneox", "bloom"))  # keep queries, keys and values of a head, or of a group, side by side
_DECAY = ".ssm_a"  # −exp of the folder's A_log (`MambaModel.modify_tensors`)
_EXP = 1e-13  # NMSE: exp as two libraries round it to float32, a unit in the last place of each value
_TRANSPOSED = frozenset(("gpt2",))  # keeps [in, out] (Conv1D)
_BY = ("GGUF", "folder")


Change = Callable[[Floats], Floats]


def check_conversion(path: Path, folder: Path, progress: Progress | None = None) -> WeightsCheck:
    """Check for each tensor of a GGUF whether it is what the folder's tensors convert to, and where config.json and metadata disagree.

    Raises:
        ModelError: the GGUF cannot be read. InputError: the folder cannot be read, or has another architecture.
    """
    model, source = GgufModel(path), Folder(folder)
    arch, heads = model.hyperparameters.architecture, (model.hyperparameters.n_heads, model.hyperparameters.n_kv_heads)
    sources, stray = sources_of(arch, model.hyperparameters.n_layers, source)
    if arch in _GROUPED:
        sources = {name: ungrouped(of, heads) if ".attn_qkv." in name else of for name, of in sources.items()}
    if not sources.keys() & model.tensors.keys():
        raise InputError(f"{folder} has no tensor of a {arch} model.", "Is it the folder from which this GGUF was made?")
    checks: list[TensorCheck] = []
    total = sum(info.n_bytes for info in model.tensors.values())
    done = 0
    for info in model.tensors.values():
        factors = rope_factors(info.name, source) if info.name in DERIVED_TENSORS else None
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


def _tied(name: str, model: GgufModel, sources: dict[str, TensorSource]) -> bool:
    """Whether a GGUF rightly lacks the output matrix: it is the embedding's, which is stored once."""
    if name != "output.weight" or "token_embd.weight" not in sources or "token_embd.weight" not in model.tensors:
        return False
    a, b = sources[name].parts[0], sources["token_embd.weight"].parts[0]
    return a.shape == b.shape and all(
        np.array_equal(a.part(slice(start, start + 1024)), b.part(slice(start, start + 1024)))
        for start in range(0, a.shape[0], 1024)
    )


def _tensor(model: GgufModel, info: TensorInfo, source: TensorSource | None, arch: str, heads: tuple[int, int]) -> TensorCheck:
    kind, count = type_name(info.type), int(np.prod(info.shape))
    if source is None:
        if info.name in DERIVED_TENSORS or info.name == "output.weight":
            reason = (
                "no tensor of the folder, and config.json does not give it"
                if info.name in DERIVED_TENSORS
                else "no tensor of the folder"
            )
            return TensorCheck(info.name, kind, info.shape, NOT_CHECKED, 0, (), f"{reason}: the converter made it")
        return TensorCheck(info.name, kind, info.shape, "extra", 0, (), "the folder has no such tensor")
    source = shaped(source, info.shape)
    size = sum(int(np.prod(part.shape)) for part in source.parts)
    if size != count:
        shapes = " + ".join(str(list(part.shape)) for part in source.parts[:2])
        return TensorCheck(info.name, kind, info.shape, DIFFERENT, 0, _BY, f"{size:,} values in the folder, {shapes}")
    right = _expected(info, arch, heads)
    distance = _compare(model, info, source, right, heads, arch)
    limit = limit_of(info.type, _EXP if info.name.endswith(_DECAY) else 0.0)
    if limit.holds(distance):
        status = EQUAL if distance is not None and not distance.errors.any() else f"{EQUAL} as {kind}"
        return TensorCheck(info.name, kind, info.shape, status, count, _BY)
    wrong = [] if distance is None else limit.wrong_rows(distance).tolist()
    first = _first_of(model, info, source, right, heads, arch, wrong[0] if wrong else 0)
    if source.in_groups is not None and limit.holds(_compare(model, info, source.in_groups, right, heads, arch)):
        mistake = "left in groups: llama.cpp expects all queries, then all keys, then all values"
        return TensorCheck(info.name, kind, info.shape, mistake, count, _BY, mistake, first)
    for mistake, change in _mistakes(info, arch, heads):
        if limit.holds(_compare(model, info, source, change, heads, arch)):
            return TensorCheck(info.name, kind, info.shape, mistake, count, _BY, mistake, first)
    turned = len(info.shape) == 2 and len(source.parts) == 1 and info.shape == source.parts[0].shape[::-1]
    if turned and limit.holds(_compare(model, info, source, right, heads, arch, turn=True)):
        mistake = "transposed: llama.cpp expects a row for each output"
        return TensorCheck(info.name, kind, info.shape, mistake, count, _BY, mistake, first)
    if other := _other(model, info, source, right, heads, arch, limit):
        mistake = f"it is {other}"
        return TensorCheck(info.name, kind, info.shape, DIFFERENT, count, _BY, mistake, first)
    reason = "nothing known gives these values" if distance is None else limit.excess(distance)
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
    model: GgufModel, info: TensorInfo, source: TensorSource, right: Change, heads: tuple[int, int], arch: str, limit: Limit
) -> str:
    """The name of the GGUF tensor of its layer, or of its kind in another one, that has these values; "" if there is none."""
    layer, kind = info.name.rsplit(".", 2)[0], info.name.split(".", 2)[-1]
    for name, other in model.tensors.items():
        related = name.startswith(f"{layer}.") or (info.name.startswith("blk.") and name.split(".", 2)[-1] == kind)
        if name == info.name or other.shape != info.shape or not related:
            continue
        _, held, wanted = next(_portions(model, other, source, right, heads, arch))
        if wanted.shape != held.shape:
            continue
        begins = Distance.of(len(held), held.shape[1])  # before the whole is compared
        begins.put(0, held, wanted)
        if limit.holds(begins) and limit.holds(_compare(model, other, source, right, heads, arch)):
            return f"exchanged: its values are in {name}"
    return ""


def _portions(
    model: GgufModel,
    info: TensorInfo,
    source: TensorSource,
    change: Change,
    heads: tuple[int, int],
    arch: str,
    *,
    turn: bool = False,
) -> Iterator[tuple[int, Floats, Floats]]:
    """(first row, the GGUF's values, those that it should have) of a few rows at a time; with `turn` of the transposed source."""
    raw = model.raw(info.name)
    rows, columns = len(raw), info.shape[-1]
    per_part = rows // len(source.parts)
    conv1d = arch in _TRANSPOSED and len(info.shape) == 2 and info.name.startswith("blk.")  # keeps [in, out]
    unit = info.shape[0] // _heads(info.name, heads) if _heads(info.name, heads) and len(info.shape) == 2 else 1
    step = max(unit, _CHUNK // columns // unit * unit)
    for part in range(0, rows, per_part):
        for start in range(part, part + per_part, step):
            stop = min(start + step, part + per_part)
            yield (
                start,
                dequantize(raw[start:stop], info.type, columns),
                change(source.rows(start, stop, per_part, transposed=conv1d != turn)),
            )


def _compare(
    model: GgufModel,
    info: TensorInfo,
    source: TensorSource,
    change: Change,
    heads: tuple[int, int],
    arch: str,
    *,
    turn: bool = False,
) -> Distance | None:
    """How far each row of a tensor is from its source; None if they do not have one shape."""
    distance = Distance.of(len(model.raw(info.name)), info.shape[-1])
    for start, held, wanted in _portions(model, info, source, change, heads, arch, turn=turn):
        if wanted.shape != held.shape:
            return None
        distance.put(start, held, wanted)
    return distance


def _first_of(
    model: GgufModel, info: TensorInfo, source: TensorSource, change: Change, heads: tuple[int, int], arch: str, row: int
) -> FirstDifference | None:
    """The first element from a row on that is off by more than a hundredth of its row's size."""
    for start, held, wanted in _portions(model, info, source, change, heads, arch):
        if wanted.shape != held.shape:
            return None
        skip = max(row - start, 0)
        if skip < len(held) and (
            first := _first(
                held[skip:].astype(np.float64), wanted[skip:].astype(np.float64), start + skip, info.shape[-1], info
            )
        ):
            return first
    return None


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
