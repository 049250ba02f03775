"""`parity drift record`: golden dumps of every prompt, which replace earlier ones only when all are written."""

import tempfile
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.diff import Uncompared
from checkpoints.errors import InputError
from checkpoints.reading.reader import read
from checkpoints.record import DEFAULT_SLICE
from checkpoints.whole_file import Replacement, put, unwritable
from reference.client import Reference
from reports import sentences

from ..run.request import Progress, Request
from ..run.session import resolve_prompt
from ..run.sides import EXEC, REF
from .dumps import GoldenDumps, chosen_by_llama_cpp
from .golden import Golden, GoldenPrompt, golden_prompt, now, read_prompts, seen_from


class GoldenRecording(Struct, frozen=True):
    """The request of `parity drift record`: how `side` ("ours", "ref", "exec") runs, on which prompts, and the folder to write.

    `run.generate` is the number of decode steps after each prompt, along llama.cpp's tokens.
    """

    run: Request
    prompts: Path
    out: Path
    side: str = REF


class Recorded(Struct, frozen=True):
    """Golden dumps, and what of the points and positions that were asked for a foreign engine did not print, by the dump's file."""

    golden: Golden
    lacking: dict[str, Uncompared] = {}


def record(request: GoldenRecording, progress: Progress | None = None) -> Recorded:
    """Write golden dumps of every prompt.

    Raises:
        ParityError: anything wrong with the request, the model or a side, in one line.
    """
    texts = read_prompts(request.prompts)
    run = request.run
    with Reference(threads=run.threads) as reference:
        if request.out.exists() and not request.out.is_dir():
            raise InputError(f"{request.out} is a file.", "Choose a folder with -o.", code="output")
        info = reference.describe(run.model).info
        golden = Golden(
            folder=request.out,
            source=request.side,
            model=seen_from(request.out, run.model),
            fingerprint=info.fingerprint,
            content=info.content,
            model_name=info.name or run.model.stem,
            mode=run.mode,
            points=run.points,
            slice_size=run.slice_size or DEFAULT_SLICE,
            build={},
            created=now(),
            prompts=(),
        )
        dumps = GoldenDumps(request.side, replace(run, generate=0), reference)
        attributes = _attributes(golden.folder)
        written: list[GoldenPrompt] = []
        lacking: dict[str, Uncompared] = {}
        with attributes, tempfile.TemporaryDirectory(prefix="parity-drift-") as scratch:
            for number, text in enumerate(texts):
                prompt = resolve_prompt(reference, run.model, text)
                if run.generate and request.side != EXEC:
                    prompt = chosen_by_llama_cpp(prompt, run, reference)
                kept = golden_prompt(prompt, f"{number:03}.jsonl")
                dumps.write(prompt, Path(scratch) / kept.file)
                if never_compared := dumps.lacking(prompt, Path(scratch) / kept.file):
                    lacking[kept.file] = never_compared
                    kept = replace(kept, lacking=sentences.uncompared(never_compared))
                written.append(kept)
                if progress is not None:
                    progress("golden", number + 1, len(texts))
            for kept in written:  # only when all are written do they replace an earlier recording
                put(golden.path(kept), (Path(scratch) / kept.file).read_bytes())
    header = read(golden.path(written[0])).header
    golden = replace(golden, prompts=tuple(written), build=dict(header.build) if header else {})
    golden.save()
    return Recorded(golden, lacking)


def _attributes(folder: Path) -> Replacement:
    """Write the git attributes of golden dumps. This is done before anything is computed, so that an unwritable folder is reported at
    once.

    Raises:
        InputError: it cannot be written to.
    """
    path = folder / ".gitattributes"
    try:
        attributes = Replacement(path)
        attributes.temporary.write_bytes(b"*.jsonl -diff\nledger.jsonl merge=union\n")
    except OSError as error:
        raise unwritable(path, error) from error
    return attributes
