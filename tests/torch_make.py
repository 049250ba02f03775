"""Writes tests/logs/*.zip of .pt files with the real torch.save; run by hand where torch is, and kept.

    parity dump ours --tokens 1,403,407 --points 'embd,blk.0.*,blk.1.l_out,output_norm,logits' --full -o run.jsonl
    python tests/torch_make.py run.safetensors tests/logs

The names and structures are those that SGLang's dumper and tensor hook, and TensorRT-LLM's debug hook give their files; the values
are our engine's, of two ranks where a rank holds a part. `torch-save.zip` has one tensor of every type, view and wrapper.
"""

import sys
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

RANKS = 2


def saved(value: Any) -> bytes:
    out = BytesIO()
    torch.save(value, out)
    return out.getvalue()


def archive(path: Path, files: dict[str, Any]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, value in files.items():
            zipped.writestr(name, saved(value))


def part(value: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    return value.chunk(RANKS, dim=axis)[rank].clone()


def dumper(run: dict[str, torch.Tensor]) -> dict[str, Any]:
    """SGLang's dumper: by dims, by trying (no dims), partial sums, the same on all; positions and ids beside."""
    files: dict[str, Any] = {}
    for rank in range(RANKS):
        dumps: list[tuple[str, int | None, torch.Tensor, str]] = [
            ("input_ids", None, torch.tensor([1, 403, 407]), ""),
            ("positions", None, torch.tensor([0, 1, 2]), ""),
            ("embed_tokens", None, run["embd"], "t d # tp:replicated"),
            ("self_attn.q_proj", 0, part(run["blk.0.q"], rank, 1), "t h[tp]"),
            ("kqv_out", 0, part(run["blk.0.kqv_out"], rank, 1), ""),
            ("attn_out", 0, run["blk.0.attn_out"] * (0.25 if rank else 0.75), "t d[tp:partial]"),
            ("ffn_inp", 0, run["blk.0.ffn_inp"], ""),
            ("l_out", 0, run["blk.0.l_out"], ""),
            ("hidden_after_mlp", 0, run["blk.0.ffn_out"], "t d"),
        ]
        for index, (name, layer, value, dims) in enumerate(dumps):
            tags = {"step": 0, "rank": rank, "dump_index": index + 1, "name": name, "recompute_status": "disabled"}
            tags |= {} if layer is None else {"layer_id": layer}
            info = {"tp_rank": rank, "tp_size": RANKS, "pp_rank": 0, "pp_size": 1}
            meta = (
                tags
                | {"world_rank": rank, "world_size": RANKS, "sglang_parallel_info": info}
                | ({"dims": dims} if dims else {})
            )
            file = "___".join(f"{key}={text}" for key, text in tags.items()) + ".pt"
            files[f"dump_20261126_101500_123456/{file}"] = {"value": value, "meta": meta}
    return files


def hook(run: dict[str, torch.Tensor]) -> dict[str, Any]:
    """SGLang's tensor hook: a file per pass and rank, keyed by module, of a prefill of two tokens and a decode step.

    A file is written when `model` returns: what that returns, and the logits, stand in the next one.
    """
    files = {}
    for rank in range(RANKS):
        for step, (begin, end) in enumerate(((0, 2), (2, 3))):
            now = {name: value[begin:end] for name, value in run.items()}
            before = {"model": run["output_norm"][:2], "logits_processor": run["logits"][1:2]} if step else {}
            files[f"TP{rank}_PP0_Rank{rank}_pid47{rank}/Pass{step:05d}.pt"] = before | {
                "model.embed_tokens": now["embd"],
                "model.layers.0.input_layernorm": now["blk.0.attn_norm"],
                "model.layers.0.self_attn.qkv_proj": [part(torch.cat([now["blk.0.q"], now["blk.0.k"]], 1), rank, 1)],
                "model.layers.0.self_attn.o_proj": now["blk.0.attn_out"],
                "model.layers.0.post_attention_layernorm": [now["blk.0.ffn_norm"], now["blk.0.ffn_inp"]],
                "model.layers.0.mlp.down_proj": now["blk.0.ffn_out"],
                "model.norm": [now["output_norm"], now["blk.1.l_out"]],
                "model.forward_batch_info.input_ids": torch.tensor([1, 403, 407][begin:end]),
                "model.forward_batch_info.seq_lens": torch.tensor([end]),
                "model.forward_batch_info.positions": torch.tensor([0, 1, 2][begin:end]),
            }
    return files


def every_module(run: dict[str, torch.Tensor]) -> dict[str, Any]:
    """SGLang's dumper with its hooks on every module: a layer returns hidden states and residual, a parameter lies beside."""
    files = {}
    returned: list[tuple[str, int | None, torch.Tensor]] = [
        ("input_ids", None, torch.tensor([1, 403, 407])),
        ("positions", None, torch.tensor([0, 1, 2])),
        ("seq_lens", None, torch.tensor([3])),
        ("non_intrusive__model.embed_tokens.inputs.0", None, torch.tensor([1, 403, 407])),
        ("non_intrusive__model.embed_tokens.output", None, run["embd"]),
        ("non_intrusive__model.layers.0.input_layernorm.output", 0, run["blk.0.attn_norm"]),
        ("non_intrusive__model.layers.0.self_attn.o_proj.output", 0, run["blk.0.attn_out"]),
        ("non_intrusive__model.layers.0.post_attention_layernorm.inputs.1", 0, run["embd"]),
        ("non_intrusive__model.layers.0.post_attention_layernorm.output.0", 0, run["blk.0.ffn_norm"]),
        ("non_intrusive__model.layers.0.post_attention_layernorm.output.1", 0, run["blk.0.ffn_inp"]),
        ("non_intrusive__model.layers.0.mlp.output", 0, run["blk.0.ffn_out"]),
        ("non_intrusive__model.layers.0.output.0", None, run["blk.0.ffn_out"]),
        ("non_intrusive__model.layers.0.output.1", None, run["blk.0.ffn_inp"]),
        ("non_intrusive__model.norm.output.0", None, run["output_norm"]),
        ("non_intrusive__logits_processor.output.next_token_logits", None, run["logits"][-1:]),
        ("non_intrusive__output.next_token_logits", None, run["logits"][-1:]),
        ("param__model.layers.0.mlp.down_proj.weight", None, run["blk.0.ffn_norm"]),
        ("grad__hidden_states", None, run["embd"]),
    ]
    for index, (name, layer, value) in enumerate(returned):
        tags = {"step": 0, "rank": 0, "dump_index": index + 1, "name": name, "recompute_status": "disabled"}
        tags |= {} if layer is None else {"layer_id": layer}
        file = "___".join(f"{key}={text}" for key, text in tags.items()) + ".pt"
        files[f"dump_20261126_101500_123456/{file}"] = {"value": value, "meta": tags}
    return files


def linear(name: str, given: torch.Tensor, returned: torch.Tensor) -> dict[str, torch.Tensor]:
    """The files of a linear module: its argument before and after, and what it returned, under the name of its next argument."""
    return {f"{name}-input.input": given, f"{name}-output.input": given, f"{name}-output.all_reduce_params": returned}


def debug_hook(run: dict[str, torch.Tensor]) -> dict[str, Any]:
    """TensorRT-LLM's debug hook: a file an argument; a layer hands on hidden states and residual. Two tokens, then a decode step, whose
    outermost modules are numbered on.
    """
    first, second = ({name: value[part] for name, value in run.items()} for part in (slice(0, 2), slice(2, 3)))
    return one_pass(first, [1, 403], 1) | one_pass(second, [407], 3)


def one_pass(run: dict[str, torch.Tensor], ids: list[int], number: int) -> dict[str, Any]:
    """The files of a forward pass whose outermost modules are numbered from `number` on."""
    files = {}
    for rank in range(RANKS):
        top = f"{number}.LlamaModel-"
        layer = f"{top}2.LlamaDecoderLayer-"
        second = f"{top}3.LlamaDecoderLayer-"
        residual, last = run["blk.0.ffn_inp"], run["blk.1.l_out"]
        for name, value in {
            f"{top}1.Embedding-input.input_ids": torch.tensor(ids),
            f"{top}1.Embedding-output.input_ids": torch.tensor(ids),
            f"{top}1.Embedding-output.1": run["embd"],
            f"{layer}1.RMSNorm-input.hidden_states": run["embd"],
            f"{layer}1.RMSNorm-output.hidden_states": run["embd"],
            f"{layer}1.RMSNorm-output.residual": run["blk.0.attn_norm"],
            **linear(f"{layer}2.LlamaAttention-2.Linear", part(run["blk.0.kqv_out"], rank, 1), run["blk.0.attn_out"]),
            f"{layer}2.LlamaAttention-output.position_ids": run["blk.0.attn_out"],
            f"{layer}3.RMSNorm-input.hidden_states": run["blk.0.attn_out"],
            f"{layer}3.RMSNorm-input.residual": run["embd"],
            f"{layer}3.RMSNorm-output.hidden_states": run["blk.0.attn_out"],
            f"{layer}3.RMSNorm-output.residual": run["embd"],
            f"{layer}3.RMSNorm-output.2": run["blk.0.ffn_norm"],
            f"{layer}3.RMSNorm-output.3": residual,
            **linear(f"{layer}4.GatedMLP-2.Linear", part(run["blk.0.ffn_swiglu"], rank, 1), run["blk.0.ffn_out"]),
            f"{layer}4.GatedMLP-input.x": run["blk.0.ffn_norm"],
            f"{layer}4.GatedMLP-output.x": run["blk.0.ffn_norm"],
            f"{layer}4.GatedMLP-output.all_rank_num_tokens": run["blk.0.ffn_out"],
            f"{layer}output.position_ids": run["blk.0.ffn_out"],
            f"{layer}output.hidden_states": residual,
            f"{second}output.position_ids": last * 0.5,
            f"{second}output.hidden_states": last * 0.5,
            f"{top}4.RMSNorm-output.hidden_states": run["output_norm"],
            f"{number + 1}.LMHead-output.hidden_states": run["logits"][-1:],
        }.items():
            files[f"data_dump/rank{rank}/{name}.pt"] = value
    return files


def every_kind() -> dict[str, Any]:
    """Types, views and wrappers; the values of each are 0, 1, …, 11 in three rows of four."""
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    names = ("float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "uint16")
    kinds: dict[str, Any] = {name: base.to(getattr(torch, name)) for name in names}
    kinds |= {"float32": base, "transposed": base.T.contiguous().T, "window": torch.arange(40.0).reshape(4, 10)[:3, :4]}
    kinds |= {
        "parameter": torch.nn.Parameter(base),
        "ordered": OrderedDict(a=base),
        "dtype": torch.float32,
        "size": base.size(),
        "float8": base.to(torch.float8_e4m3fn),
    }
    return {"kinds.pt": kinds, "layer_0.pt": base, "state.pt": torch.nn.Linear(4, 3).state_dict()}


def hashes(fault: float = 1.0) -> str:
    """DebugMode's log of two layers; `fault` is a factor on the second one's result."""
    from torch.utils._debug_mode import DebugMode

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))
    x = torch.randn(3, 8)
    with torch.no_grad():
        model[2].weight.mul_(fault)
        with DebugMode(record_nn_module=True) as mode, DebugMode.log_tensor_hashes():
            model(x)
    return str(mode.debug_string())


if __name__ == "__main__":
    values, out = load_file(sys.argv[1]), Path(sys.argv[2])
    whole = {name.rpartition("/")[0] or name: value for name, value in values.items()}
    archive(out / "sglang-dumper.zip", dumper(whole))
    archive(out / "sglang-hook.zip", hook(whole))
    archive(out / "sglang-modules.zip", every_module(whole))
    archive(out / "tensorrt-llm.zip", debug_hook(whole))
    archive(out / "torch-save.zip", every_kind())
    (out / "debug-mode.log").write_text(hashes())
    (out / "debug-mode-wrong.log").write_text(hashes(1.01))
