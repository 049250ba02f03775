"""An engine against itself: the same positions computed in other portions must come out the same."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.consistency import Check, Consistency
from checkpoints.answers.diff import Verdict
from checkpoints.errors import DumpError, InputError
from checkpoints.formats import load
from checkpoints.points import parse
from checkpoints.record import Dump, Header
from reference.client import Reference

from ..arbiter.arbiter import Arbiter
from ..diff.compare import Options, compare
from ..run.command import PORTIONS
from ..run.request import Prompt, Request
from ..run.session import comparison_options, resolve_prompt
from ..run.sides import EXEC, OURS, OurEngine, Side, side_of

CACHE, POSITIONS, MASK, BATCH = "cache", "positions", "mask", "batch size"
_BY_KIND = {
    **dict.fromkeys(("q_rope", "k_rope"), POSITIONS),
    **dict.fromkeys(("k_read", "v_read"), CACHE),
    "kq_soft_max": MASK,
    **dict.fromkeys(("kq", "kqv_out"), CACHE),
}
_WORDS = {
    CACHE: "keys or values of earlier passes are not those that were computed: rows written to or read from other places",
    POSITIONS: "Q or K are rotated by another position: the count of earlier tokens is not added, or added twice",
    MASK: "scores are right and weights are not: the mask takes positions of this pass for positions in the sequence",
    BATCH: "the same row comes out differently among other rows: a kernel that depends on the number of tokens",
}
_ROWWISE = ("attn_norm", "q", "k", "v", "attn_out", "ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out")


@dataclass(frozen=True)
class ConsistencyRequest:
    """What `parity consistency` was asked for; with two dumps, a foreign engine's, only `run`'s mapping and limits count."""

    run: Request
    source: str = OURS
    chunk: int = 4
    dumps: tuple[Path, Path] | None = None


def consistency(request: ConsistencyRequest) -> Consistency:
    """Compute a prompt as a whole and in other portions, and compare every point.

    Raises:
        ParityError: whatever is wrong with the request, the model or the dumps, in one line.
    """
    if request.dumps is not None:
        return two_dumps(request, *request.dumps)
    if request.chunk < 1:
        raise InputError(f"--chunk must be at least 1, not {request.chunk}.", "Take 1 or more.", code="chunk")
    run = request.run
    with Reference(verbose=run.verbose, threads=run.threads) as reference:
        side = side_of(request.source, run, reference, resident=True)
        prompt = resolve_prompt(reference, run.model, run.prompt, run.tokens)
        vocabulary = reference.tokenize(run.model, "a").n_vocab
        return of_side(side, replace(prompt, text=None), request, vocabulary)


def of_side(side: Side, prompt: Prompt, request: ConsistencyRequest, vocabulary: int) -> Consistency:
    """The checks of a side, over a prompt; `vocabulary` is the number of token ids.

    Raises:
        InputError: fewer than two tokens, or tokens that the model cannot take.
    """
    count = len(prompt.ids)
    if count < 2:
        raise InputError("one token cannot be computed in portions.", "Take a longer prompt.", code="prompt")
    side.check(prompt)
    run, command = request.run, request.run.command
    takes_portions = request.source != EXEC or command is None or command.takes(PORTIONS)
    options = comparison_options(run)
    if isinstance(side, OurEngine):  # GELU's table is coarse: float64 says how far two right passes may be apart
        options = replace(options, truth=Arbiter.of(side.engine, prompt.ids, run.first_position))
    checks: list[Check] = []
    with TemporaryDirectory(prefix="parity-consistency-") as folder:

        def dumped(prompt: Prompt) -> Dump:
            out = Path(folder) / "dump.jsonl"
            side.dump(prompt, out)
            return load(out, run.mapping)

        whole = dumped(prompt)
        for name, portions in (_portions(count, request.chunk) if takes_portions else {}).items():
            verdict = compare(dumped(replace(prompt, portions=tuple(portions))), whole, options)
            suspect, reason = suspected(verdict, _starts(portions))
            checks.append(Check(name, f"{_said(portions)} against a prefill of {count}", verdict, suspect, reason))
        other = dumped(replace(prompt, ids=(*prompt.ids[:-1], (prompt.ids[-1] + 1) % vocabulary), pieces=()))
        checks.append(_causal(other, whole, prompt.ids, options))
    return Consistency(
        _described(side, whole),
        tuple(checks),
        (
            *(() if takes_portions else (f"portions: {side.name} is not told about them; put {PORTIONS} into --exec",)),
            "padding and batches of several prompts: one sequence is computed at a time",
        ),
    )


def _described(side: Side, whole: Dump) -> str:
    header = whole.header
    if header is None or not header.model.architecture:
        return side.name
    model = header.model
    device = header.build.get("device") or header.build.get("backend", "")
    described = f"{model.name} · {model.architecture}, {model.layers} layers"
    return " · ".join(filter(None, [side.name, described, device]))


def _portions(count: int, chunk: int) -> dict[str, list[int]]:
    """Ways to compute `count` positions, by name."""
    ways = {"prefill and one step": [count - 1, 1], "one token at a time": [1] * count}
    if chunk < count:
        ways["chunks"] = [chunk] * (count // chunk) + ([count % chunk] if count % chunk else [])
    return ways


def _starts(portions: Sequence[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *portions[:-1]])


def _said(portions: Sequence[int]) -> str:
    if len(set(portions)) == 1 and len(portions) > 1:
        return f"{len(portions)} × {portions[0]}"
    return " + ".join(map(str, portions)) if len(portions) <= 4 else f"{portions[0]} + … + {portions[-1]}"


def _causal(other: Dump, whole: Dump, ids: Sequence[int], options: Options) -> Check:
    """The last token exchanged: no position before it may notice."""
    stop = len(ids) - 1
    verdict = compare(_before(other, stop, ids), _before(whole, stop, ids), options)
    suspect = "" if verdict else MASK
    reason = "" if verdict else "earlier positions see a later token: no causal mask, or one that is off by one"
    return Check("another last token", "the last token exchanged", verdict, suspect, reason)


def _before(dump: Dump, stop: int, ids: Sequence[int]) -> Dump:
    points = {name: rows.take(rows.token_idx < stop) for name, rows in dump.points.items()}
    points = {name: rows for name, rows in points.items() if len(rows)}
    header = None if dump.header is None else replace(dump.header, tokens=tuple(ids), pieces=())
    return replace(dump, header=header, points=points)


_ALL_POINTS = "--points all tells which of them"
_MORE_POINTS = "dumps of q_rope, k_rope, kq_soft_max and kqv_out would tell which of them"


def suspected(verdict: Verdict, starts: NDArray[np.int64], advice: str = _ALL_POINTS) -> tuple[str, str]:
    """What to suspect where a comparison_options of portions fails, and a sentence; nothing where it doesn't.

    Args:
        starts: the first positions of the portions, int64.
        advice: what would tell more, where the recorded points leave it open.
    """
    first = verdict.first_divergence
    if verdict or first is None:
        return "", ""
    kinds = [parse(origin.first.checkpoint).kind for origin in verdict.origins] or [parse(first.checkpoint).kind]
    suspects = [_BY_KIND[kind] for kind in kinds if kind in _BY_KIND]
    at = f"first at {first.checkpoint}, position {first.token_idx}"
    if suspects:
        return suspects[0], f"{_WORDS[suspects[0]]} ({at})"
    if first.token_idx < int(starts[1] if len(starts) > 1 else 0) or parse(first.checkpoint).kind in _ROWWISE:
        return BATCH, f"{_WORDS[BATCH]} ({at})"
    later = "cache, positions or mask"
    return later, f"right within the first portion, wrong behind it ({at}): {advice}"


def two_dumps(request: ConsistencyRequest, left: Path, right: Path) -> Consistency:
    """Two dumps of a foreign engine over the same tokens, computed in different portions.

    Raises:
        DumpError: a dump cannot be read, or both were computed in the same portions.
    """
    a, b = load(left, request.run.mapping), load(right, request.run.mapping)
    passes = [_passes(dump) for dump in (a, b)]
    if passes[0] == passes[1]:
        raise DumpError(
            f"{left.name} and {right.name} were computed in the same portions ({_said(passes[0])}).",
            "Dump once with the prompt in one pass and once with decode steps or chunks, and record `step`.",
            code="portions",
        )
    verdict = compare(a, b, comparison_options(request.run))
    finer = max(passes, key=len)
    suspect, reason = suspected(verdict, _starts(finer), _MORE_POINTS)
    source = (a.header or b.header or Header("")).source
    check = Check(
        "two dumps", f"{left.name} ({_said(passes[0])}) against {right.name} ({_said(passes[1])})", verdict, suspect, reason
    )
    return Consistency(
        source or "a foreign engine", (check,), ("padding and batches: dump them and compare with `parity diff`",)
    )


def _passes(dump: Dump) -> list[int]:
    """How many positions each forward pass had, in order: from the point with most records."""
    rows = max(dump.points.values(), key=len)
    return [int(n) for n in np.unique(rows.step, return_counts=True)[1]]
