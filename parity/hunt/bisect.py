"""Which layers of a foreign engine are wrong, each given the reference's input: `parity_inject` puts it there.

Two runs judge every layer: one in which the inputs of even layers are the reference's, and one for the odd layers. What a layer
computes from a right input is compared before anything is put in its place, so that it doesn't matter in which order the engine records
and injects.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.bisect import NOT_JUDGED, RIGHT, WRONG, Bisected, JudgedPart
from checkpoints.errors import DumpError, InputError
from checkpoints.formats import load
from checkpoints.points import EMBD, parse
from checkpoints.record import Dump, Rows
from reference.client import Reference

from ..diff.compare import comparison
from ..diff.measured.tokens import TOKENS
from ..lint.lint import refuse_unusable
from ..run.command import Command
from ..run.request import Progress, Prompt, Request
from ..run.results import dumps_of
from ..run.session import OURS_FILE, REF_FILE, comparison_options, following, resolve_prompt, run_folder
from ..run.sides import ExternalEngine, LlamaCpp

VARIABLE = "PARITY_INJECT"
_MAGIC = b"PARITY-INJECT 1\n"
_SECOND_FILE = "ours-odd.jsonl"
_AFTER = "output"  # what follows the last layer

Given = Mapping[str, NDArray[np.float32]]  # point -> rows [T, n]


def bisect(request: Request, progress: Progress | None = None, started: Reference | None = None) -> Bisected:
    """Run the engine twice, with the reference's values as the inputs of every other layer, and judge each layer by itself.

    Raises:
        InputError: there is no engine, tokens are to be generated, or the engine injects nothing; ParityError: as `parity run`.
    """
    command = request.command
    if command is None:
        raise InputError("--bisect needs an engine of yours.", "Give its command with --exec.", code="exec")
    if request.generate:
        raise InputError(
            "--bisect works on a prompt only and cannot be combined with --generate.", "Leave one of them out.", code="bisect"
        )
    began = perf_counter()
    with started or Reference(verbose=request.verbose, threads=request.threads) as reference, run_folder(request) as folder:
        prompt = resolve_prompt(reference, request.model, request.prompt, request.tokens)
        described = reference.describe(request.model)
        known = [name for name, _ in described.points]
        slots = [EMBD, *(f"blk.{layer}.l_out" for layer in range(described.n_layers))]
        lacking = [name for name in slots if name not in known]
        if lacking:
            raise InputError(
                f"llama.cpp has no {lacking[0]} in this model.",
                "Use --hunt, which finds the operation without it.",
                code="bisect",
            )
        request = replace(request, points=request.points if request.points != "default" else _names(slots))
        with dumps_of(folder) as dumps:
            even_run, odd_run = _both(request, command, reference, prompt, slots, dumps, progress)
            reference_dump = _reference(request, reference, prompt, even_run, odd_run, dumps, progress)
    if (other := _other_tokens(request, prompt, even_run, reference_dump)) is not None:
        return Bisected((other,), 2, command.name, perf_counter() - began, str(folder))
    parts = tuple(_judge(request, slots, even_run, odd_run, reference_dump))
    if any(part.status != RIGHT for part in parts) and all(
        _same(rows, odd_run.points.get(name)) for name, rows in even_run.points.items()
    ):
        raise InputError(
            f"{command.name} does not inject anything: it printed the same values with other inputs.",
            f"Call parity_inject after the checkpoints of {EMBD} and of each layer's output (`parity emit c`).",
            code="bisect",
        )
    return Bisected(parts, 2, command.name, perf_counter() - began, str(folder))


def _other_tokens(request: Request, prompt: Prompt, dump: Dump, ref: Dump) -> JudgedPart | None:
    """The tokens as a wrong part, if the dump lists others than the prompt's: then the injected rows are those of other positions."""
    if dump.header is None or not dump.header.tokens or dump.header.tokens == prompt.ids:
        return None
    verdict = comparison(dump, ref, comparison_options(request)).verdict
    place, pattern = verdict.first_divergence, verdict.pattern
    if place is None or place.checkpoint != TOKENS:
        return None
    why = pattern.sentence if pattern is not None else "your engine computed other tokens than the prompt's"
    return JudgedPart(TOKENS, WRONG, token_idx=place.token_idx, reason=why)


def _names(slots: list[str]) -> str:
    return ",".join([*slots, "output_norm", "logits"])


def write_values(path: Path, values: Given) -> None:
    """A file for $PARITY_INJECT: positions from 0 on of each point, float32."""
    with path.open("wb") as file:
        file.write(_MAGIC)
        for name, rows in values.items():
            file.write(f"{name} 0 {rows.shape[0]} {rows.shape[1]}\n".encode())
            file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())


def _both(
    request: Request,
    command: Command,
    reference: Reference,
    prompt: Prompt,
    slots: list[str],
    folder: Path,
    progress: Progress | None,
) -> tuple[Dump, Dump]:
    """The engine's dumps with the inputs of even layers replaced, and with those of odd ones."""
    dumps = []
    for first, name in ((0, OURS_FILE), (1, _SECOND_FILE)):
        file = folder / f"inject-{first}.bin"
        points = ",".join(slots[first::2])
        values = {
            node.point: rows.reshape(len(prompt.ids), -1)
            for node, rows in reference.capture(request.model, prompt.ids, points, request.mode)
        }
        try:
            write_values(file, values)
            side = ExternalEngine(request, replace(command, variables=((VARIABLE, str(file.resolve())),)), reference)
            if progress is not None:
                progress(f"run {first + 1} of {side.name}", 0, None)
            side.dump(prompt, folder / name)
        finally:
            file.unlink(missing_ok=True)
        dump = load(folder / name, request.mapping)
        if not request.despite_lint:
            refuse_unusable(dump, "your engine's dump")
        dumps.append(dump)
    return dumps[0], dumps[1]


def _reference(
    request: Request,
    reference: Reference,
    prompt: Prompt,
    even_run: Dump,
    odd_run: Dump,
    folder: Path,
    progress: Progress | None,
) -> Dump:
    """llama.cpp's dump of everything that either run printed."""
    together = replace(even_run, points=odd_run.points | even_run.points)
    known = [name for name, _ in reference.describe(request.model).points]
    LlamaCpp(following(request, together, prompt, known), reference).dump(prompt, folder / REF_FILE, progress)
    return load(folder / REF_FILE)


def _judge(request: Request, slots: list[str], even_run: Dump, odd_run: Dump, ref: Dump) -> Iterator[JudgedPart]:
    """The embedding, each layer and what follows the last one, from the run in which its input was the reference's."""
    layers = len(slots) - 1
    for number in range(-1, layers + 1):
        before = slots[number] if number >= 0 else None
        inside = [name for name in ref.points if _part(name, layers) == number]
        dump, other = (even_run, odd_run) if number % 2 == 0 else (odd_run, even_run)
        title = EMBD if number < 0 else _AFTER if number == layers else f"blk.{number}"
        yield _judged(request, title, before, inside, dump, other, ref)


def _part(point: str, layers: int) -> int:
    """−1 for the embedding, a layer's number, and the number of layers for what follows them."""
    layer = parse(point).layer
    return layer if layer is not None else -1 if point == EMBD else layers


def _judged(
    request: Request, title: str, before: str | None, inside: list[str], dump: Dump, other: Dump, ref: Dump
) -> JudgedPart:
    points = {name: dump.points[name] for name in inside if name in dump.points}
    if not points:
        return JudgedPart(title, NOT_JUDGED, reason="none of its points was recorded")
    try:
        compared = comparison(
            replace(dump, points=points),
            replace(ref, points={name: ref.points[name] for name in points}),
            replace(comparison_options(request), strict=True),
        )
    except DumpError as error:
        return JudgedPart(title, NOT_JUDGED, reason=error.message)
    records = compared.records
    wrong = next((point for point in compared.verdict.points if point.failed), None)
    if wrong is None:
        return JudgedPart(title, RIGHT, records=len(records.measures.nmse))
    unmoved = before is not None and all(_same(points[name], other.points.get(name)) for name in points)
    if unmoved and before is not None and not _equal(other.points.get(before), ref.points.get(before)):
        return JudgedPart(title, NOT_JUDGED, reason=f"the engine did not take {before}")
    worst = wrong.worst
    return JudgedPart(title, WRONG, wrong.checkpoint, worst.nmse, worst.limit, worst.token_idx, len(records.measures.nmse))


def _same(a: Rows, b: Rows | None) -> bool:
    return b is not None and a.values.shape == b.values.shape and np.array_equal(a.values, b.values, equal_nan=True)


def _equal(a: Rows | None, b: Rows | None) -> bool:
    """Whether two sides have the same input anyway, as far as both recorded it: then injecting it changes nothing."""
    if a is None or b is None or len(a) != len(b):
        return False
    width = min(a.values.shape[1], b.values.shape[1])
    return np.array_equal(a.values[:, :width], b.values[:, :width])
