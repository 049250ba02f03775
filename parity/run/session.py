"""Both sides of one experiment into one run folder: ours.jsonl, ref.jsonl, diff.json, report.html."""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.diff import PARITY, Verdict
from checkpoints.answers.picture import Picture
from checkpoints.errors import DumpError, InputError
from checkpoints.formats import load
from checkpoints.nearest import unknown_names
from checkpoints.points import DEFAULT_LAYERS, ENCODER, default_layers, in_vocabulary, parse
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from checkpoints.whole_file import make_folders, remove_empty
from reference.client import Reference

from ..diff.compare import Comparison, Options, comparison
from .completeness import held_to
from .request import Progress, Prompt, Request
from .results import dumps_of
from .sides import EXEC, OURS, ExternalEngine, LlamaCpp, Side, side_of

if TYPE_CHECKING:
    from .hugging_face import HuggingFace

OURS_FILE, REF_FILE, HF_FILE = "ours.jsonl", "ref.jsonl", "hf.jsonl"


class Outcome(Struct, frozen=True):
    """The result of a run, and its folder. `seconds` is the wall time of both sides and the comparison."""

    folder: Path
    ours: Dump
    ref: Dump
    verdict: Verdict
    picture: Picture
    seconds: float


@contextmanager
def run_folder(request: Request) -> Iterator[Path]:
    """The run's folder, created and writable: `--out`, or a new one, runs/<time>-<model>.

    A run that fails leaves none that it made and did not fill.

    Raises:
        InputError: it cannot be created or written to.
    """
    name = re.sub(r"[^\w.-]+", "-", request.model.stem)[:60]
    folder = request.out or Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}"
    made: tuple[Path, ...] = ()
    try:
        if request.out is None:
            made = make_folders(folder.parent)
            folder = _new_folder(folder)
            made = (folder, *made)
        else:
            made = make_folders(folder)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        remove_empty(made)
        raise InputError(f"cannot write to {folder}: {error.strerror}.", "Choose another --out.", code="output") from error
    try:
        yield folder
    except BaseException:
        remove_empty(made)
        raise


def _new_folder(wanted: Path) -> Path:
    """A folder that is there from now on and was not before: with a number behind its name where another run began in the same second."""
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return folder


def resolve_prompt(reference: Reference, model: Path, text: str | None, tokens: tuple[int, ...] | None = None) -> Prompt:
    """The prompt's ids and pieces, as llama.cpp tokenizes it; `tokens`, if given, are used instead of `text`.

    Raises:
        InputError: the prompt has no tokens, or ids are outside the vocabulary.
    """
    if tokens is not None:
        return Prompt(text, tokens, tuple(reference.pieces(model, tokens)))
    text = text or ""
    tokenized = reference.tokenize(model, text)
    if not tokenized.ids:
        raise InputError("the prompt has no tokens.", "Give at least one word.", code="prompt")
    return Prompt(text, tuple(tokenized.ids), tuple(tokenized.pieces))


def run(
    request: Request,
    progress: Progress | None = None,
    started: Reference | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    judge: Callable[[Dump, Dump, Options], Comparison] = comparison,
) -> Outcome:
    """Run both sides and compare them with `judge`.

    `started` is a reference that was started earlier, and is closed here; `meanwhile` is called when only llama.cpp is left to wait
    for.

    Raises:
        ParityError: anything wrong with the request, the model, a side or the reference, in one line.
    """
    began = perf_counter()
    # The child process starts first: it imports llama.cpp while our side opens the model.
    with started or Reference(verbose=request.verbose, threads=request.threads) as reference, run_folder(request) as folder:
        ours = side_of(OURS if request.command is None else EXEC, request, reference)
        prompt = resolve_prompt(reference, request.model, request.prompt, request.tokens)
        ours.check(prompt)
        with dumps_of(folder) as dumps:
            if isinstance(ours, ExternalEngine) and (request.points, request.layers) == ("default", None):
                _one_after_the_other(request, reference, ours, prompt, dumps, progress)
            else:
                _at_once(request, reference, ours, prompt, dumps, progress, meanwhile)
        points = ours.requested if isinstance(ours, ExternalEngine) else ()
    left, right = load(folder / OURS_FILE, request.mapping), load(folder / REF_FILE)
    if request.command is not None and not request.despite_lint:
        from ..lint.lint import refuse_unusable

        refuse_unusable(left, "your engine's dump")
    compared = judge(left, right, comparison_options(request))
    verdict = held_to(compared, points, ours, request, prompt) if isinstance(ours, ExternalEngine) else compared.verdict
    unseen = ours.not_run if isinstance(ours, ExternalEngine) and verdict.verdict == PARITY else ()
    verdict = replace(verdict, notes=(*taken_instead(request, right), *verdict.notes, *unseen))
    return Outcome(folder, left, right, verdict, compared.picture, perf_counter() - began)


def comparison_options(request: Request) -> Options:
    """How the two dumps of a run are compared."""
    return Options(
        tolerance=request.tolerance,
        compute=request.compute,
        strict=request.strict,
        placed=request.mapping.position_offset is not None,
    )


def _at_once(
    request: Request,
    reference: Reference,
    ours: Side,
    prompt: Prompt,
    folder: Path,
    progress: Progress | None,
    meanwhile: Callable[[], None],
) -> None:
    """Run both sides at the same time, unless tokens are generated: then llama.cpp chooses them first, and ours follows."""
    ref = LlamaCpp(replace(request, points=ours.points, layers=None), reference)
    if request.generate:
        chosen = ref.dump(prompt, folder / REF_FILE, progress).generated
        prompt = prompt.followed_by(chosen, tuple(reference.pieces(request.model, chosen)))
        ours.dump(prompt, folder / OURS_FILE, progress)
        return
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(ref.dump, prompt, folder / REF_FILE, progress)
        try:
            ours.dump(prompt, folder / OURS_FILE, progress)
            meanwhile()
        except BaseException:
            reference.close()  # its result is no longer needed
            raise
        pending.result()


def _one_after_the_other(
    request: Request, reference: Reference, ours: ExternalEngine, prompt: Prompt, folder: Path, progress: Progress | None
) -> None:
    """Run a foreign engine that was not asked for certain points first; llama.cpp then records the points that it printed."""
    if request.generate:
        with TemporaryDirectory(prefix="parity-run-") as scratch:
            chooser = LlamaCpp(replace(request, points="logits", slice_size=1, full=False), reference)
            chosen = chooser.dump(prompt, Path(scratch) / REF_FILE, progress).generated
        prompt = prompt.followed_by(chosen, tuple(reference.pieces(request.model, chosen)))
    ours.dump(prompt, folder / OURS_FILE, progress)
    printed = load(folder / OURS_FILE, request.mapping)
    LlamaCpp(following(request, printed, prompt, ours.known), reference).dump(prompt, folder / REF_FILE, progress)


def following(request: Request, dump: Dump, prompt: Prompt, known: Sequence[str] = ()) -> Request:
    """The request that records what a dump has: its points, its positions, and at least as many values per row.

    Positions beyond the prompt are left out: an engine that goes on by itself, or doubles BOS, has more than were asked for. `known` are
    the points of this model in llama.cpp: other names are left out, and the comparison says that the reference lacks them.

    Raises:
        DumpError: llama.cpp has none of its points.
    """
    # `blk.N.<node>` may be a name of llama.cpp's; it cannot have any other name that is not a point.
    points = [name for name in dump.points if in_vocabulary(name) or parse(name.removeprefix(ENCODER)).layer is not None]
    points = [name for name in points if not known or name in known]
    if not points:
        raise DumpError(f"{dump.path} has no point that llama.cpp has.", *unknown_names(dump.points), code="points")
    widest = max(int(dump.points[name].counts.max(initial=0)) for name in points)
    size = None if request.slice_size is None else max(request.slice_size, widest)
    request = replace(request, points=",".join(points), layers=None, slice_size=size)
    if dump.header is None:  # bare lines may count from anywhere: the comparison will find out
        return request
    recorded = {int(t) for rows in dump.points.values() for t in rows.token_idx}
    end = request.first_position + len(prompt.ids) + (len(prompt.generated) or request.generate)
    return replace(request, positions=tuple(sorted({t for t in recorded if t < end} or recorded)))


def taken_instead(request: Request, ref: Dump) -> tuple[str, ...]:
    """A sentence that says which layers were recorded instead, if the model lacks some of the default ones."""
    layers = ref.header.model.layers if ref.header else None
    if layers is None or request.points != "default" or request.layers is not None or max(DEFAULT_LAYERS) == layers - 1:
        return ()
    wanted, taken = (
        " and ".join(", ".join(map(str, some)).rsplit(", ", 1)) for some in (DEFAULT_LAYERS, default_layers(layers))
    )
    return (f"the model has {layers} layer{'s' * (layers > 1)}: {taken} were recorded instead of {wanted}",)


def with_hugging_face(outcome: Outcome, side: "HuggingFace", progress: Progress | None = None) -> tuple[Dump, str]:
    """Hugging Face as the third side of a run, on the same tokens and points.

    Returns:
        Its dump, and a sentence if transformers' tokenizer gives the prompt other ids, else "".

    Raises:
        EngineError: transformers cannot load or run the model. DumpError: it has none of the points.
    """
    header = outcome.ref.header
    assert header is not None
    assert header.tokens is not None
    generated = tuple(token.id for token in outcome.ref.tokens)
    prompt = Prompt(header.prompt, header.tokens, header.pieces or (), generated=generated)
    out = outcome.folder / HF_FILE
    tokenizer = replace(side, points=",".join(outcome.ref.points)).dump(prompt, out, progress)
    return read(out), tokenizer.difference(prompt) if header.prompt is not None else ""
