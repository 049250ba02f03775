"""`parity isolate`: every operation judged by its own inputs."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError

from ..run.prompt import given_prompt, numbers
from . import options as o


class CacheType(StrEnum):
    """What llama.cpp's KV cache holds."""

    F32 = "f32"
    F16 = "f16"


def isolate(
    dump: Annotated[
        Path | None,
        typer.Argument(help="Your engine's dump with whole values; without it llama.cpp's own operations are proven."),
    ] = None,
    model: o.ModelOption = None,
    prompt: o.PromptOption = None,
    prompt_file: o.PromptFileOption = None,
    tokens: o.TokensOption = None,
    mode: Annotated[
        o.Mode | None,
        typer.Option(
            "--mode",
            help="native: the file's own types with ggml's rounding; exact: all in F32. Default: the dump's mode, else native.",
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
    names: o.MapOption = None,
    offset: o.OffsetOption = None,
    compute: o.ComputeOption = None,
    windows: Annotated[
        bool, typer.Option(help="Let llama.cpp judge layers of which only inputs and outputs were recorded.")
    ] = True,
    graft: Annotated[
        str | None,
        typer.Option("--graft", help="blk.N.l_out: llama.cpp goes on from your hidden state; does the next token change?"),
    ] = None,
    threads: o.ThreadsOption = None,
    form: o.FormatOption = o.Format.TEXT,
    verbose: o.VerboseOption = False,
) -> None:
    """Name all operations that are wrong, and those that are proven right and need not be looked at again.

    Your engine writes garbage and everything after the first wrong value is wrong as well? Here no error is inherited: each
    operation of each layer is computed again from the inputs that it really had, and compared with its output.

      parity isolate ours.jsonl --model M.gguf       your engine: record whole rows (dump --full, or all values in each record)

      parity isolate --model M.gguf --prompt "Hi"    llama.cpp itself: our definition of each operation is held to it

    Exits 0 if nothing is wrong, 1 if something is.
    """
    from ..isolate.isolate import IsolateRequest
    from ..isolate.isolate import isolate as judge
    from ..models.embedded import path as default_model
    from .output import answer

    if dump is None and any(value is not None for value in (tensors, names, offset)):
        raise InputError("--tensors, --map and --offset need a dump.", "Give it: parity isolate DUMP …", code="usage")
    given = [value for value in (prompt, prompt_file, tokens) if value is not None]
    text, ids = given_prompt(prompt, prompt_file, tokens) if dump is None or given else (None, None)
    found = judge(
        IsolateRequest(
            model=model or default_model(),
            prompt=text,
            tokens=ids,
            mode=mode.value if mode is not None else "",
            kv_type=kv_type.value,
            generate=generate,
            rows=numbers(rows, "--rows") if rows is not None else (),
            dump=dump,
            tensors=tensors,
            mapping=o.mapping(names, offset),
            compute=compute.value if compute else None,
            windows=windows,
            graft=graft,
            threads=threads,
            verbose=verbose,
        )
    )
    from reports import isolation

    raise typer.Exit(answer(found, isolation, form))
