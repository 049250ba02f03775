"""Whether a foreign engine printed what it was asked for: that the printed records agree says nothing about missing ones."""

from collections.abc import Sequence

from msgspec.structs import replace

from checkpoints.answers.diff import INCOMPLETE, PARITY, Verdict
from checkpoints.points import in_vocabulary

from ..diff.compare import Comparison
from ..diff.measured.uncompared import uncompared
from .request import Prompt, Request
from .sides import ExternalEngine


def held_to(compared: Comparison, points: Sequence[str], engine: ExternalEngine, request: Request, prompt: Prompt) -> Verdict:
    """The verdict, with those of `points` (known ones, in dataflow order) and of the prompt's positions that were never compared.

    It is incomplete instead of parity if the model's last point was asked for by name and did not come, or if nothing came of the
    prompt's last position: an engine that stops halfway must not pass. With --strict anything that did not come makes it so.
    """
    records, verdict = compared.records, compared.verdict
    positions = set(_positions(request, prompt))
    at = set(records.token_idx.tolist())
    lacking = uncompared(points, set(records.names), positions, at)
    if not lacking or verdict.left_out:
        return verdict
    result = engine.requested_by_name and next(filter(in_vocabulary, reversed(engine.known)), "") in lacking.points
    last = bool(positions) and max(positions) in lacking.positions
    incomplete = verdict.verdict == PARITY and (result or last or request.strict)
    return replace(verdict, uncompared=lacking, verdict=INCOMPLETE if incomplete else verdict.verdict)


def _positions(request: Request, prompt: Prompt) -> Sequence[int]:
    """The prompt's positions that were asked for."""
    every = range(request.first_position, request.first_position + len(prompt.ids))
    if isinstance(request.positions, str):
        return every if request.positions == "all" else every[-1:]
    return [position for position in request.positions if position in every]
