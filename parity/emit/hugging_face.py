"""Hugging Face's own model as a side. `parity emit hf` prints this file together with the recorder: it runs where torch and
transformers are, which parity itself does not need.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .hugging_face_names import ATTENTIONS, BY_GROUPS, GATED, PERMUTED, names_of
from .recorder import Recorder


class Observer:
    """Records what a transformers model computes, under the names that llama.cpp gives it."""

    def __init__(self, model: Any, tap: Recorder) -> None:
        self.model = model
        self.tap = tap
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.config = config
        self.kind = str(config.model_type)
        self.heads = int(getattr(config, "num_attention_heads", None) or 1)  # a recurrent model has none
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        if hasattr(config, "multi_query"):  # falcon, gpt_bigcode
            grouped = getattr(config, "new_decoder_architecture", False)
            self.kv_heads = config.num_kv_heads if grouped else 1 if config.multi_query else self.heads
        self.layer = 0
        self.projected: dict[str, Any] = {}
        self.rotated: dict[str, Any] = {}
        # If the embedding is multiplied before the first layer reads it, the module's output is not ggml's `embd`.
        self.scaled = type(model.get_input_embeddings()).__name__ != "Embedding"
        # Where the model itself multiplies it, ggml's `embd` is the product (Granite, AFMoE).
        self.multiplier = float(getattr(config, "embedding_multiplier", None) or 1)
        if getattr(config, "mup_enabled", False):
            self.multiplier = float(config.hidden_size) ** 0.5
        gelu = "gelu" in str(next((getattr(config, name) for name in GATED if hasattr(config, name)), ""))
        self.renamed = {"ffn_swiglu": "ffn_geglu"} if gelu else {}

    @contextmanager
    def attached(self) -> "Iterator[None]":
        """Hooks on every module whose name is known, and on the function that rotates queries and keys."""
        modules = dict(self.model.named_modules())
        handles = []
        for path, point in names_of(self.model).items():
            module = modules[path.rstrip("<")]
            if path.endswith("<"):
                handles.append(module.register_forward_pre_hook(self._input(point)))
            else:
                handles.append(module.register_forward_hook(self._output(point)))
        attentions = {
            path: module for path, module in modules.items() if path.endswith(ATTENTIONS) and path.split(".")[-2].isdigit()
        }
        for path, module in attentions.items():
            number = int(path.split(".")[-2])
            handles.append(module.register_forward_pre_hook(self._enter(number)))
            handles.append(module.register_forward_hook(self._weights(number)))
        place = sys.modules[type(next(iter(attentions.values()))).__module__] if attentions else None
        wrappers = {"apply_rotary_pos_emb": self._rotated, "eager_attention_forward": self._attended}
        replaced = {name: getattr(place, name) for name in wrappers if hasattr(place, name)}
        self.whole = len(replaced) == len(wrappers)
        for name, function in replaced.items():
            setattr(place, name, wrappers[name](function))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, function in replaced.items():
                setattr(place, name, function)

    def _output(self, point: str) -> "Callable[..., None]":
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            self._value(point, output[0] if isinstance(output, tuple) else output, inputs[0] if inputs else None)

        return hook

    def _input(self, point: str) -> "Callable[..., None]":
        def hook(_module: Any, inputs: Any) -> None:
            self._value(point, inputs[0], None)

        return hook

    def _enter(self, layer: int) -> "Callable[..., None]":
        def hook(_module: Any, _inputs: Any) -> None:
            self.layer = layer

        return hook

    def _weights(self, layer: int) -> "Callable[..., None]":
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            weights: Any = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if getattr(weights, "ndim", 0) == 4:
                self.tap(f"blk.{layer}.kq_soft_max", weights[0])

        return hook

    def _rotated(self, rotate: "Callable[..., Any]") -> "Callable[..., Any]":
        def wrapped(*arguments: Any, **named: Any) -> Any:
            result = rotate(*arguments, **named)
            if not (isinstance(result, tuple) and len(result) == 2):  # GPT-J: called for each of the two
                return result
            for point, value, heads in zip(("q_rope", "k_rope"), result, (self.heads, self.kv_heads), strict=True):
                if value.ndim == 4 and value.shape[1] == heads:  # [B, H, T, d]
                    self.rotated[point] = value
            if not self.whole:
                self._after_rotation({})
            return result

        return wrapped

    def _attended(self, attend: "Callable[..., Any]") -> "Callable[..., Any]":
        def wrapped(module: Any, query: Any, key: Any, *arguments: Any, **named: Any) -> Any:
            self._after_rotation({"q_rope": query, "k_rope": key})
            return attend(module, query, key, *arguments, **named)

        return wrapped

    def _after_rotation(self, read: "dict[str, Any]") -> None:
        """Record Q and K after RoPE, [B, H, T, d]; with the elements that it leaves alone where only a head's first ones are rotated.

        Args:
            read: what the attention reads, which has all elements.
        """
        for point, rotated in self.rotated.items():
            whole, size = read.get(point, rotated), rotated.shape[-1]
            partly = whole.shape[-1] > size and bool((whole[..., :size] == rotated).all())
            self._heads(f"blk.{self.layer}.{point}", (whole if partly else rotated).transpose(1, 2))
        self.rotated = {}

    def _value(self, point: str, value: Any, source: Any) -> None:
        layer, _, kind = point.rpartition(".")
        if kind == "embd" and self.scaled:
            point = "inp_scaled"
        elif kind == "embd" and self.multiplier != 1:
            value = value * self.multiplier
        elif kind == "qkv":
            q, k, v = self._split(value)
            self._heads(f"{layer}.q", q)
            self._heads(f"{layer}.k", k)
            self.tap(f"{layer}.v", v)
            return
        elif kind in ("q", "k"):
            size = getattr(self.config, "head_dim", None)
            if size and value.shape[-1] != size * (self.heads if kind == "q" else self.kv_heads):
                return  # more than the queries: Qwen3-Next's gate stands beside them
            self.projected[kind] = value
            self._heads(point, value.unflatten(-1, (self.heads if kind == "q" else self.kv_heads, -1)))
            return
        elif kind in ("q_norm", "k_norm") and value.ndim == 4:
            before = self.projected.get(kind[0])
            # [B, T, H, d], or [B, H, T, d] where the norm comes after the transposition: its input tells.
            if before is not None and source is not None and source.numel() == before.numel():
                plain = bool((source.reshape(before.shape) == before).all())
            else:
                plain = value.shape[2] == (self.heads if kind == "q_norm" else self.kv_heads)
            value = value if plain else value.transpose(1, 2)
        # A router sees the tokens of all sequences in one row, [T, experts]; everything else is [B, T, …].
        flat = value if value.ndim == 2 else value.reshape(*value.shape[:2], -1)
        self.tap(f"{layer}.{self.renamed.get(kind, kind)}" if layer else point, flat)

    def _split(self, value: Any) -> "tuple[Any, Any, Any]":
        """Queries, keys and values of one fused projection, [B, T, (H + 2K)·d], side by side or by groups; Q and K by heads."""
        size = value.shape[-1] // (self.heads + 2 * self.kv_heads)
        if self.kind in BY_GROUPS:
            groups = value.unflatten(-1, (self.kv_heads, -1, size))
            return groups[..., :-2, :].flatten(-3, -2), groups[..., -2, :], groups[..., -1, :].flatten(-2)
        q, k, v = value.split((self.heads * size, self.kv_heads * size, self.kv_heads * size), dim=-1)
        return q.unflatten(-1, (self.heads, size)), k.unflatten(-1, (self.kv_heads, size)), v

    def _heads(self, point: str, value: Any) -> None:
        """Queries or keys [B, T, H, d], in the order in which a GGUF file has their rows."""
        if self.kind in PERMUTED:
            value = value.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        self.tap(point, value.flatten(-2))


def load(path: Path, device: str) -> Any:
    """The model in float32 with eager attention: a GGUF file, which transformers dequantises itself, or a folder of safetensors."""
    import torch
    from transformers import AutoModelForCausalLM

    where, file = _source(path)
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, attn_implementation="eager", local_files_only=True, **file
    )
    return model.to(device).eval()


def tokenized(path: Path, prompt: str) -> "dict[str, Any]":
    """Ids and pieces of a prompt as transformers' tokenizer makes them."""
    from transformers import AutoTokenizer

    where, file = _source(path)
    tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, **file)
    ids = [int(number) for number in tokenizer(prompt)["input_ids"]]
    return {"ids": ids, "pieces": [tokenizer.decode([number]) for number in ids]}


def _source(path: Path) -> "tuple[str, dict[str, str]]":
    """The arguments of `from_pretrained` for a path: a folder unchanged, a GGUF file as its folder and its name."""
    return (str(path), {}) if path.is_dir() else (str(path.parent), {"gguf_file": path.name})


def dump(
    model: Any,
    tokens: "Sequence[int]",
    out: Path,
    *,
    points: str = "",
    positions: str = "all",
    size: int = 16,
    prompt: "str | None" = None,
    name: str = "",
) -> int:
    """Run the tokens in one forward pass and write every known value; returns the number of records.

    A `size` of 0 writes whole rows; `name` is the model's; `points` and `positions` are as on the command line.

    Raises:
        ValueError: there is no such position or token; OSError: the file cannot be written.
    """
    import torch

    size_of_vocabulary = model.get_input_embeddings().num_embeddings
    for token in tokens:
        if not 0 <= token < size_of_vocabulary:
            raise ValueError(f"token id {token} is outside the vocabulary (0…{size_of_vocabulary - 1})")
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    with Recorder(
        out,
        compute="f32",
        model=name or str(config.model_type),
        tokens=tokens,
        prompt=prompt,
        layers=int(config.num_hidden_layers),
        source="Hugging Face",
        points=points,
        positions=_positions(positions, len(tokens)),
        slice_size=size or 1 << 31,
    ) as tap:
        observer = Observer(model, tap)
        ids = torch.tensor([list(tokens)], device=model.device)
        with torch.no_grad(), observer.attached():
            # Logits come from here and not from `lm_head`: some families cap them afterwards.
            logits = model(input_ids=ids, use_cache=False, output_attentions=True).logits
        tap("logits", logits)
        return tap.checkpoints


def _positions(text: str, count: int) -> "Sequence[int] | None":
    """The positions of `count` tokens that "all", "last" or a list with commas names; None for all.

    Raises:
        ValueError: a malformed list, or a position after the last token.
    """
    if text in ("all", ""):
        return None
    listed = [count - 1] if text == "last" else [int(part) for part in text.split(",")]
    if min(listed) < 0 or max(listed) >= count:
        raise ValueError(f"--positions {text}: there are positions 0 to {count - 1}")
    return listed


def main() -> int:
    """Read the command line and write the dump; an error is one line on stderr."""
    parser = argparse.ArgumentParser(description="Checkpoints of a Hugging Face model, for parity diff.")
    parser.add_argument("model", type=Path, help="a GGUF file, or a folder with config.json and safetensors")
    parser.add_argument("--tokens", help="token ids with commas")
    parser.add_argument("--prompt", help="text; without --tokens transformers' tokenizer makes ids of it")
    parser.add_argument("--prompt-file", type=Path, help="file with the prompt, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="the dump to write")
    parser.add_argument(
        "--points", default="", help="names to record, with commas, or with wildcards (blk.*.q); default: all that are known"
    )
    parser.add_argument("--positions", default="all", help="positions to record: all, last, or a list with commas")
    parser.add_argument("--slice", type=int, default=16, help="leading values in each record; 0: whole rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokenizer", type=Path, help="write here what transformers' tokenizer makes of --prompt, as JSON")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: the model is on disk
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if given.prompt_file is not None:
        try:
            given.prompt = given.prompt_file.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"cannot read {given.prompt_file}: {error}")
    if given.tokens is None and given.prompt is None:
        parser.error("give --tokens or --prompt")
    own: dict[str, Any] = {}
    if given.prompt is not None:
        try:
            own = tokenized(given.model, given.prompt)
        except Exception as error:  # a tokenizer raises anything; where ids are given it is not needed
            own = {"problem": _one_line(error)}
        if given.tokenizer is not None:
            given.tokenizer.write_text(json.dumps(own), encoding="utf-8")
    try:
        tokens: list[int] = [int(part) for part in given.tokens.split(",")] if given.tokens is not None else own["ids"]
    except (ValueError, KeyError):
        print(f"no token ids: {own.get('problem') or '--tokens takes whole numbers with commas'}", file=sys.stderr)
        return 2
    try:
        model = load(given.model, given.device)
    except Exception as error:  # of many kinds: an architecture, a file or a device that transformers cannot use
        print(f"transformers cannot load {given.model}: {_one_line(error)}", file=sys.stderr)
        return 2
    what = {"points": given.points, "positions": given.positions, "size": given.slice, "prompt": given.prompt}
    try:
        count = dump(model, tokens, given.out, **what, name=given.model.name)
    except ValueError as error:
        print(_one_line(error).removeprefix("ValueError: "), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot write {given.out}: {error.strerror}", file=sys.stderr)
        return 2
    if not count:
        print(f"this model has none of these points: {given.points}", file=sys.stderr)
    return 0 if count else 2


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    sys.exit(main())
