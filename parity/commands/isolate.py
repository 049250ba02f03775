"""`parity isolate`: every operation judged by its own inputs."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError

from ..run.prompt import given_prompt, numbers
from . import options as o


class CacheType(StrEnum):
    """The type of llama.cpp's KV cache."""

    F32 = "f32"
    F16 = "f16"


@o.fills("model", "optional_prompt", "mapping", "compute", "threads", "verbose")
def isolate(
    given: o.Given,
    context: typer.Context,
    dump: Annotated[
        Path | None,
        typer.Argument(help="Your engine's dump with whole values; without it, llama.cpp's own operations are judged."),
    ] = None,
    mode: Annotated[
        o.Mode | None,
        typer.Option(
            "--mode",
            help="native: the file's own types with ggml's rounding; exact: all in F32. Default: the dump's mode, otherwise native.",
        ),
    ] = None,
    kv_type: Annotated[CacheType, typer.Option("--kv-type", help="llama.cpp's KV cache (native mode).")] = CacheType.F32,
    generate: Annotated[int, typer.Option("--generate", min=0, help="Decode steps to judge after the prompt.")] = 0,
    rows: Annotated[
        str | None, typer.Option("--rows", help="Logits to recompute one by one from the output matrix's rows: 8850,44394.")
    ] = None,
    tensors: Annotated[
        Path | None, typer.Option("--tensors", help="The dump's safetensors file, if it is not beside the dump.")
    ] = None,
    windows: Annotated[
        bool, typer.Option(help="Let llama.cpp judge layers of which only inputs and outputs were recorded.")
    ] = True,
    graft: Annotated[
        str | None,
        typer.Option(
            "--graft", help="blk.N.l_out: llama.cpp continues from your hidden state there; does the next token change?"
        ),
    ] = None,
    output_format: o.FormatOption = o.Format.TEXT,
) -> None:
    """Name all operations that are wrong, and those that are proven right and need no further attention.

    Once one value is wrong, everything computed from it is wrong as well. Here no error is inherited: each
    operation of each layer is computed again from the inputs that it actually had, and compared with its output.

      parity isolate ours.jsonl --model M.gguf       your engine, whole rows

      parity isolate --model M.gguf --prompt "Hi"    llama.cpp itself

    Exits 0 if nothing is wrong, 1 if something is.
    """
    from checkpoints.mapping import Mapping
    from reports import isolation

    from ..isolate.isolate import IsolateRequest
    from ..isolate.isolate import isolate as judge
    from .output import answer, waiting

    if dump is None and (tensors is not None or given["mapping"] != Mapping()):
        raise InputError("--tensors, --map and --offset need a dump.", "Give it: parity isolate DUMP …", code="usage")
    if dump is None:
        o.refuse_unused(context, "compute windows", "is for a dump", "Give it: parity isolate DUMP …")
    else:
        o.refuse_unused(context, "kv_type generate", "is for llama.cpp's own operations: a dump says what it holds")
    if dump is None and given["prompt"] is given["tokens"] is None:
        given_prompt(None, None, None)
    request = IsolateRequest(
        **given,
        mode=mode.value if mode is not None else "",
        kv_type=kv_type.value,
        generate=generate,
        rows=numbers(rows, "--rows") if rows is not None else (),
        dump=dump,
        tensors=tensors,
        windows=windows,
        graft=graft,
    )
    with waiting("judging operations", output_format):
        judged = judge(request)
    raise typer.Exit(answer(judged, isolation, output_format))
