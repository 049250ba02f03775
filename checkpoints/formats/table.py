"""The formats of other programs: the first that recognises a path reads it; everything else is read as JSON lines."""

from pathlib import Path
from types import ModuleType

from ..errors import DumpError
from ..regular import require_regular
from . import (
    arrays,
    columns,
    debug_mode,
    edge_llm,
    etdump,
    eval_callback,
    llama_debug,
    model_debugger,
    sglang,
    tensorrt_llm,
    torch_file,
    vllm,
)

FORMATS = (
    columns,
    etdump,
    model_debugger,
    edge_llm,
    llama_debug,
    sglang,
    tensorrt_llm,
    vllm,
    arrays,
    torch_file,
    debug_mode,
    eval_callback,
)

_PIPED = "Write the dump to a file, or give - and pipe JSON lines in."


def format_of(place: Path) -> ModuleType | None:
    """The format that recognises a path; None for JSON lines.

    Raises:
        DumpError: it cannot be read, is a pipe, or a folder that no format knows.
    """
    try:
        require_regular(place, DumpError, _PIPED)
        recognised = next((dump_format for dump_format in FORMATS if dump_format.detect(place)), None)
        folder = place.is_dir()
    except OSError as error:
        raise DumpError(f"cannot read {place}: {error.strerror}.", "Check the path.", code="no-file") from error
    if recognised is None and folder:
        dumps = sorted(file.name for file in place.glob("*.jsonl"))
        advice = f"Name one of the dumps in it: {', '.join(dumps[:4])}." if dumps else "Name a dump."
        raise DumpError(
            f"{place} is a folder without .npy, .npz, .safetensors or .pt files or a debugger tree.", advice, code="no-file"
        )
    return recognised
