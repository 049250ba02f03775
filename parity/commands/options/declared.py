"""Options that several commands share, each declared once: its name, its type, its help."""

from pathlib import Path
from typing import Annotated

import typer

from .choices import AnswerFormat, ArbiterChoice, BackendName, Compute, Format, Mode

_LONGEST_ROW = 1 << 31  # values: more than any row of an activation has
_MOST_THREADS = 512  # GGML_MAX_N_THREADS in ggml.h: beyond it llama.cpp crashes

ModelOption = Annotated[Path | None, typer.Option("--model", "-m", help="GGUF file; default: the embedded stories model.")]
PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")]
PromptFileOption = Annotated[Path | None, typer.Option("--prompt-file", help="File with the prompt, UTF-8.")]
TokensOption = Annotated[str | None, typer.Option("--tokens", help="Token ids instead of a prompt: 1,2,3.")]
ModeOption = Annotated[
    Mode,
    typer.Option(
        "--mode", help="exact: F32 on both sides, where a right engine agrees to 1e-12; native: the file's own types."
    ),
]
PointsOption = Annotated[
    str, typer.Option("--points", help="What to record: default, all, or names and globs such as 'blk.{1..5}.{q,k}'.")
]
LayersOption = Annotated[str | None, typer.Option("--layers", help="Layers whose output is recorded: 0,5,10,23.")]
PositionsOption = Annotated[str, typer.Option("--positions", help="all, last, or a list: 0,3,7.")]
SliceOption = Annotated[int, typer.Option("--slice", min=1, max=_LONGEST_ROW, help="Number of leading values in each record.")]
FullOption = Annotated[bool, typer.Option("--full", help="Also write whole tensors, as safetensors.")]
BinaryOption = Annotated[
    bool,
    typer.Option(
        "--binary", help="Write records as arrays in a safetensors file beside the dump: large dumps are read ten times faster."
    ),
]
ArbiterOption = Annotated[
    ArbiterChoice,
    typer.Option(
        "--arbiter",
        help="Decide by the same steps in float64 which side is right: where that helps (auto), everywhere (all), or never (off).",
    ),
]
BackendOption = Annotated[BackendName, typer.Option("--backend", help="Where our engine computes.")]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices", help="CUDA devices, e.g. 0,1: consecutive layers are placed on consecutive devices.", show_default=False
    ),
]
WindowOption = Annotated[
    str,
    typer.Option(
        "--window",
        help="Run llama.cpp in windows of layers: auto, off, or layers per window (exact mode, for models larger than memory).",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=_MOST_THREADS, help="Threads of llama.cpp; default: all cores.")
]
FirstOption = Annotated[
    int, typer.Option("--first-position", min=0, help="Position of the first token, to test RoPE at long contexts.")
]
ToleranceOption = Annotated[
    float | None,
    typer.Option("--tolerance", min=0.0, help="NMSE above which a record differs; default: looked up by types and mode."),
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Count records that only one side has as a divergence.")]
AnswerOption = Annotated[
    AnswerFormat,
    typer.Option("--format", help="text for people; json; for CI: markdown (job summary), junit, github (annotations)."),
]
ComputeOption = Annotated[
    Compute | None, typer.Option("--compute", help="The arithmetic of your engine, if its dump does not name it.")
]
DespiteLintOption = Annotated[bool, typer.Option("--despite-lint", help="Compare even if lint finds a dump unusable.")]
MapOption = Annotated[
    Path | None, typer.Option("--map", help='TOML file that maps your names to points: "their name" = "our point".')
]
OffsetOption = Annotated[
    int | None,
    typer.Option(
        "--offset", help="Number added to every position of your dump; 0: its positions count from the prompt's first token."
    ),
]
ExecOption = Annotated[
    str | None,
    typer.Option(
        "--exec",
        help="Run your engine as our side: '[NAME=value …] CMD {model} {tokens} {out} {points}'; {model} is the F32 twin in exact mode.",
    ),
]
TestedExecOption = Annotated[
    str | None,
    typer.Option("--exec", help="The engine to test: '[NAME=value …] CMD {model} {tokens} {out} {points}'."),
]
ShellOption = Annotated[
    str | None, typer.Option("--exec-shell", help="Your engine as a command line for /bin/sh, with the same placeholders.")
]
TimeoutOption = Annotated[
    float | None,
    typer.Option("--exec-timeout", min=0.001, help="Seconds after which your engine is stopped; default: 3600."),
]
TINY_TIMEOUT = 120.0  # seconds for a tiny model: engines that compile their kernels at start take tens of them
TinyTimeoutOption = Annotated[
    float | None,
    typer.Option("--exec-timeout", min=0.001, help=f"Seconds after which your engine is stopped; default: {TINY_TIMEOUT:g}."),
]
PythonOption = Annotated[
    str,
    typer.Option("--python", envvar="PARITY_HF_PYTHON", help="Interpreter that has torch and transformers, for Hugging Face."),
]
HfDeviceOption = Annotated[str, typer.Option("--hf-device", help="Where Hugging Face computes: cpu, cuda, cuda:1, mps.")]
GenerateOption = Annotated[
    int,
    typer.Option(
        "--generate", min=0, help="Number of tokens to generate: llama.cpp chooses them, the other side gets the same ones."
    ),
]
FormatOption = Annotated[Format, typer.Option("--format", help="text for people, json for machines.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show llama.cpp's own log.")]
