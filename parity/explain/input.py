"""The input of `parity explain`: the prompt, and a reference that our own engine is checked against first."""

from pathlib import Path

from msgspec.structs import replace

from checkpoints.answers.diff import Verdict
from checkpoints.answers.explain import Explanation
from checkpoints.errors import InputError
from checkpoints.record import Dump

from ..diff.compare import Options, compare
from .case import Case, ExplainOptions, Half, open_model
from .explain import explain
from .half_cases import decoder_case, encoder_case
from .records.records import right_rows
from .rounding.not_as_stated import CONTRADICTED
from .rounding.precision import KINDS


def prompt_ids(model: Path, prompt: str | None, tokens: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The given token ids, or llama.cpp's ids of the given text; None if neither was given."""
    if prompt is None:
        return tokens
    from reference.client import Reference

    with Reference() as reference:
        return tuple(reference.tokenize(model, prompt).ids)


def check_reference(ref: Dump, model: Path, options: ExplainOptions) -> None:
    """Check our engine against llama.cpp's dump of this prompt.

    Raises:
        InputError: they differ, so that our engine cannot stand in for llama.cpp here.
    """
    transformer = open_model(model, options)
    if transformer.encoder is None:
        cases: list[Case | None] = [Case(ref, Half(transformer), options)]
    else:
        cases = [encoder_case(ref, transformer, options), decoder_case(ref, transformer, options)]
    for case in cases:
        if case is not None:
            _check(case, ref)


def _check(case: Case, ref: Dump) -> None:
    header = case.header()
    if ref.header is not None:
        header = replace(header, mode=ref.header.mode, kv_type=ref.header.kv_type)
    points = {entry.point: case.dump.points[entry.point] for entry in case.entries}
    right = Dump("our engine", header, right_rows(case.replay, case.positions, points))
    verdict: Verdict = compare(right, case.dump, Options(placed=True))
    if not verdict:
        where = verdict.first_divergence
        place = f" at {where.checkpoint}, position {where.token_idx}" if where is not None else ""
        raise InputError(
            f"our engine and {ref.path} differ{place}: it cannot replace llama.cpp here.",
            "Is the reference of this model, prompt and mode? `parity run` compares the two.",
            code="reference",
        )


def explain_dump(dump: Dump, model: Path, options: ExplainOptions) -> Explanation:
    """`explain`, with the arithmetic that the dump's header states, unless the numbers show that it is not the engine's."""
    stated = dump.header.compute.lower() if dump.header is not None else ""
    if dump.header is None or options.compute is not None or stated not in KINDS:
        return explain(dump, model, options)
    answer = explain(dump, model, replace(options, compute=stated))
    notes = [note for note in answer.notes if note.startswith(CONTRADICTED)]
    if not notes:
        return answer
    answer = explain(replace(dump, header=replace(dump.header, compute="")), model, options)
    return replace(answer, notes=(*notes, *answer.notes))
