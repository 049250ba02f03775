"""Both sides of one experiment into one run folder: ours.jsonl, ref.jsonl, diff.json, report.html."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from checkpoints.answers.diff import Verdict
from checkpoints.answers.picture import Picture
from checkpoints.errors import DumpError, InputError
from checkpoints.formats import load
from checkpoints.nearest import unknown_names
from checkpoints.points import DEFAULT_LAYERS, default_layers, parse
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from reference.client import Reference
from reference.jobs import DumpJob, DumpResult

from ..diff.compare import Options, comparison
from ..diff.tokens import same_model
from ..lint.lint import refuse_unusable
from .request import Generated, Progress, Prompt, Request
from .sides import Foreign, Own


@dataclass(frozen=True)
class Outcome:
    """What a run found and where it lies. `seconds` is the wall time of both sides and the comparison."""

    folder: Path
    ours: Dump
    ref: Dump
    verdict: Verdict
    picture: Picture
    seconds: float


def new_folder(request: Request) -> Path:
    """The run's folder, made and writable: `--out`, or runs/<time>-<model>.

    Raises:
        InputError: it cannot be made or written to.
    """
    name = re.sub(r"[^\w.-]+", "-", request.model.stem)[:60]
    folder = request.out or Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}.", "Choose another --out.", code="output") from error
    return folder


def resolve_prompt(reference: Reference, request: Request) -> Prompt:
    """The prompt's ids and pieces, as llama.cpp makes them.

    Raises:
        InputError: the prompt has no tokens, or ids are outside the vocabulary.
    """
    if request.tokens is not None:
        return Prompt(request.prompt, request.tokens, tuple(reference.pieces(request.model, request.tokens)))
    text = request.prompt or ""
    made = reference.tokenize(request.model, text)
    if not made.ids:
        raise InputError("the prompt has no tokens.", "Write a word at least.", code="prompt")
    return Prompt(text, tuple(made.ids), tuple(made.pieces))


def reference_job(request: Request, prompt: Prompt, out: Path, lead: tuple[int, ...] | None = None) -> DumpJob:
    """What llama.cpp is asked to record."""
    return DumpJob(
        model=request.model,
        out=out,
        tokens=prompt.ids,
        prompt=prompt.text,
        pieces=prompt.pieces,
        mode=request.mode,
        points=request.points,
        layers=request.layers,
        positions=request.positions,
        slice=request.slice_size,
        full=request.full,
        generate=request.generate,
        lead=lead,
        window=request.window,
        threads=request.threads,
        first_position=request.first_position,
    )


def run(
    request: Request,
    progress: Progress | None = None,
    started: Reference | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run both sides and compare them.

    `started` is a reference that was started ahead, and is ended here; `meanwhile` is called where nothing is left to do but
    to wait for llama.cpp.

    Our engine and llama.cpp compute at the same time, unless tokens are generated: then llama.cpp goes first and
    chooses, and ours is led along the same tokens.

    Raises:
        ParityError: whatever is wrong with the request, the model or the reference, in one line.
    """
    began = perf_counter()
    # The child process starts first: it imports llama.cpp while our side opens the model.
    with started or Reference(verbose=request.verbose, threads=request.threads) as reference:
        ours = Foreign(request, reference) if request.command else Own(request)
        folder = new_folder(request)
        prompt = resolve_prompt(reference, request)
        ref_path, ours_path = folder / "ref.jsonl", folder / "ours.jsonl"
        ours.check(prompt)
        job = reference_job(replace(request, points=ours.points, layers=None), prompt, ref_path)
        if progress is not None:
            progress("llama.cpp", 0, None)
        if request.generate:
            chosen = reference.dump(job).generated
            ours.dump(prompt, ours_path, Generated(chosen, tuple(reference.pieces(request.model, chosen))), progress)
        else:
            with ThreadPoolExecutor(1) as pool:
                pending = pool.submit(reference.dump, job)
                try:
                    ours.dump(prompt, ours_path, None, progress)
                    meanwhile()
                except BaseException:
                    reference.close()  # nobody waits for it any more
                    raise
                pending.result()
    left, right = load(ours_path, request.mapping), read(ref_path)
    if request.command and not request.despite_lint:
        refuse_unusable(left, "your engine's dump")
    options = Options(
        tolerance=request.tolerance,
        compute=request.compute,
        strict=request.strict,
        placed=request.mapping.position_offset is not None,
    )
    found = comparison(left, right, options)
    verdict = replace(found.verdict, notes=(*taken_instead(request, right), *found.verdict.notes))
    return Outcome(folder, left, right, verdict, found.picture, perf_counter() - began)


def taken_instead(request: Request, ref: Dump) -> tuple[str, ...]:
    """A sentence where the default layers are not all there, saying which were recorded in their place."""
    layers = ref.header.model.layers if ref.header else None
    if layers is None or request.points != "default" or request.layers is not None or max(DEFAULT_LAYERS) == layers - 1:
        return ()
    wanted, taken = (
        " and ".join(", ".join(map(str, some)).rsplit(", ", 1)) for some in (DEFAULT_LAYERS, default_layers(layers))
    )
    return (f"the model has {layers} layer{'s' * (layers > 1)}: recorded {taken} instead of {wanted}",)


def dump_ours(request: Request, out: Path, progress: Progress | None = None) -> None:
    """`parity dump ours`: our side alone."""
    with Reference(verbose=request.verbose) as reference:
        side = Own(request)
        prompt = resolve_prompt(reference, request)
    side.check(prompt)
    side.dump(prompt, out, None, progress)


def dump_reference(request: Request, out: Path, follow: Dump | None = None) -> DumpResult:
    """`parity dump ref`: llama.cpp alone, on a prompt, or led along the tokens, points and positions of another dump.

    Raises:
        DumpError: the dump to follow does not say its tokens, or has none of its own points in llama.cpp.
    """
    with Reference(verbose=request.verbose, threads=request.threads) as reference:
        if follow is None:
            return reference.dump(reference_job(request, resolve_prompt(reference, request), out))
        same_model(follow, request.model)
        if request.prompt is None and request.tokens is None:
            request = replace(request, **_prompt_of(follow))
        prompt = resolve_prompt(reference, request)
        if follow.header is not None:  # bare lines may count from anywhere: the comparison will find out
            recorded = {int(t) for rows in follow.points.values() for t in rows.token_idx}
            request = replace(request, positions=tuple(sorted(recorded)))
        # `blk.N.<node>` may be a name of llama.cpp's; what is neither that nor a point it cannot have.
        followed = [name for name in follow.points if parse(name).known or parse(name).layer is not None]
        if not followed:
            raise DumpError(
                f"{follow.path} has no point that llama.cpp could have.", *unknown_names(follow.points), code="points"
            )
        request = replace(request, points=",".join(followed))
        lead = tuple(token.id for token in follow.tokens)
        return reference.dump(reference_job(request, prompt, out, lead or None))


def _prompt_of(dump: Dump) -> dict[str, Any]:
    if dump.header is not None and dump.header.tokens:
        return {"tokens": dump.header.tokens, "prompt": dump.header.prompt}
    if dump.header is not None and dump.header.prompt:
        return {"prompt": dump.header.prompt}
    raise DumpError(f"{dump.path} does not say which tokens it is of.", "Give --prompt or --tokens as well.", code="tokens")
