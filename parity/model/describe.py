"""What an engine must know of a model, as plain data."""

from pathlib import Path
from typing import Any

from checkpoints.errors import ParityError
from checkpoints.points import parse
from engine.blocks import ROPE_FACTORS, Blocks
from engine.models import architectures, steps_of, written_by_hand
from engine.weights.gguf_model import GgufModel, Hyperparameters
from reference.jobs import NATIVE

NO_ROPE = "none"


def describe(path: Path) -> dict[str, Any]:
    """Facts of a model file, in the order in which an engine meets them.

    Raises:
        ModelError: the file cannot be read as a model.
    """
    model = GgufModel(path)
    hp = model.hyperparameters
    facts: dict[str, Any] = {
        "file": str(path),
        "name": hp.name,
        "architecture": hp.architecture,
        "file_type": hp.file_type,
        "fingerprint": model.fingerprint,
        "content": model.info.content,
        "layers": hp.n_layers,
        "width": hp.n_embd,
        "heads": hp.n_heads,
        "kv_heads": hp.n_kv_heads,
        "head_size": hp.head_size,
        "value_size": hp.value_size,
        "feed_forward": hp.n_ff,
        "vocabulary": hp.n_vocab,
        "context": hp.n_ctx_train,
        "norm_epsilon": _epsilon(model),
        "rope_base": hp.rope_base,
        "rope_dimensions": hp.rope_dims,
        "rope_linear_scale": hp.rope_scale,
        "rope_factors": ROPE_FACTORS in model.tensors,
        "tied_output": "output.weight" not in model.tensors,
        "biases": sorted({_family(name) for name in model.tensors if name.endswith(".bias")}),
        "tokenizer": _tokenizer(model),
        "weights": _types(model),
    }
    if not written_by_hand(hp, model.tensors):
        of_graph = _of_the_graph(model)
        if of_graph.get("rope") == NO_ROPE:  # what the metadata say, or leave to the defaults, is read by nobody
            facts = {key: value for key, value in facts.items() if not key.startswith("rope_")}
        return facts | of_graph
    steps = steps_of(hp.architecture, Blocks(hp, model.tensors))
    pairs = {step.params["pairs"] for step in steps if "pairs" in step.params}
    facts["rope_pairs"] = {"neox": "NEOX: x[i] with x[i + d/2]", "norm": "NORM: x[2i] with x[2i + 1]"}[pairs.pop()]
    facts |= _otherwise(model)
    facts["steps"] = f"written by hand for {' and '.join(architectures())}, with a mode for fast decoding"
    facts["points"] = {step.makes: _shape(step.makes, hp) for step in steps}
    return facts


def _otherwise(model: GgufModel) -> dict[str, Any]:
    """Numbers of the metadata that llama.cpp computes otherwise; nothing if there are none, or if llama.cpp does not load the file."""
    from engine.ignored import sentences
    from reference.client import Reference

    try:
        with Reference() as reference:
            ignored = sentences(reference.graph(model.path, NATIVE), model.metadata)
    except ParityError:
        return {}
    return {"not_as_the_file_says": list(ignored)} if ignored else {}


def _epsilon(model: GgufModel) -> float | None:
    """The ε that the metadata have for norms, of RMS norms if they have both."""
    keys = (f"{model.hyperparameters.architecture}.attention.layer_norm_{kind}epsilon" for kind in ("rms_", ""))
    held = [value for key in keys if isinstance(value := model.metadata.get(key), float)]
    return float(f"{held[0]:.6g}") if held else None  # the file holds a float32; its shortest text is the number meant


def _of_the_graph(model: GgufModel) -> dict[str, Any]:
    """What llama.cpp's graph of a model says, numbers of the metadata that it computes otherwise, and the points that it can record."""
    from engine.ignored import sentences
    from reference.client import Reference

    from .graph_facts import graph_facts, rotates

    with Reference() as reference:
        points = {name: [str(size) for size in shape] for name, shape in reference.describe(model.path).points}
        try:
            recorded = reference.graph(model.path, NATIVE)
            facts = graph_facts(recorded)
            if otherwise := sentences(recorded, model.metadata):
                facts = {"not_as_the_file_says": list(otherwise), **facts}
            if not rotates(recorded):
                facts = {"rope": NO_ROPE, **facts}
            elif all(tensor.name != ROPE_FACTORS for tensor in recorded.several.tensors):  # the file may have them for nobody
                facts = {"rope_factors": False, **facts}
        except ParityError as error:
            facts = {"graph": f"not recorded: {error.message}"}
    return {**facts, "steps": "read from llama.cpp's graph", "points": points}


def _family(name: str) -> str:
    point = parse(name)
    return f"blk.N.{point.kind}" if point.layer is not None else name


def _types(model: GgufModel) -> dict[str, int]:
    from gguf import GGMLQuantizationType

    counts: dict[str, int] = {}
    for info in model.tensors.values():
        name = GGMLQuantizationType(info.type).name
        counts[name] = counts.get(name, 0) + 1
    return counts


def _tokenizer(model: GgufModel) -> dict[str, Any]:
    wanted = {"model": "model", "pre": "pre", "bos": "bos_token_id", "eos": "eos_token_id", "add_bos": "add_bos_token"}
    facts = {short: model.metadata.get(f"tokenizer.ggml.{key}") for short, key in wanted.items()}
    return {short: value for short, value in facts.items() if value is not None}


def _shape(name: str, hp: Hyperparameters) -> list[str]:
    """A row's shape with the model's numbers in the place of the letters; t+1 stays."""
    known = parse(name).known
    # A value head's width stands where the letters say d for V and what is made of it.
    size = hp.value_size if parse(name).kind in ("v", "v_read", "kqv_out") else hp.head_size
    numbers = {
        "D": hp.n_embd,
        "F": hp.n_ff,
        "V": hp.n_vocab,
        "H": hp.n_heads,
        "H*d": hp.n_heads * size,
        "K*d": hp.n_kv_heads * size,
    }
    return [str(numbers.get(letter, letter)) for letter in (known.row if known else ())]
