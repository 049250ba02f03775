"""An engine against itself: the same positions computed in other portions must come out the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.consistency import Check, Consistency
from checkpoints.answers.diff import Verdict
from checkpoints.errors import DumpError, InputError
from checkpoints.formats import load
from checkpoints.mapping import Mapping
from checkpoints.points import parse
from checkpoints.record import Dump, Header, Rows, Token
from engine.backend import choose
from engine.capture.host import Capture
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from reference.client import Reference

from ..diff.compare import Options, compare
from ..run.ours import chosen_points
from ..run.request import Request
from ..run.session import resolve_prompt

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


@dataclass(frozen=True)
class ConsistencyRequest:
    """What `parity consistency` was asked for; with two dumps, a foreign engine's."""

    model: Path
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    points: str = "all"
    chunk: int = 4
    backend: str = "auto"
    dumps: tuple[Path, Path] | None = None
    mapping: Mapping | None = None
    compute: str | None = None
    tolerance: float | None = None
    verbose: bool = False


class _Kept:
    """A sink that keeps the records instead of writing them."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Rows]] = {}

    def rows(self, rows: Rows) -> None:
        """Keep the records of one point and pass."""
        self.parts.setdefault(rows.point, []).append(rows)

    def token(self, token: Token) -> None:
        """Tokens are given here, not chosen."""


def consistency(request: ConsistencyRequest) -> Consistency:
    """Compute a prompt as a whole and in other portions, and compare every point.

    Raises:
        ParityError: whatever is wrong with the request, the model or the dumps, in one line.
    """
    if request.dumps is not None:
        return two_dumps(request, *request.dumps)
    engine = Transformer(GgufModel(request.model), choose(request.backend))
    with Reference(verbose=request.verbose) as reference:
        ids = resolve_prompt(reference, Request(request.model, request.prompt, request.tokens)).ids
    return of_engine(engine, ids, request)


def of_engine(engine: Transformer, ids: Sequence[int], request: ConsistencyRequest) -> Consistency:
    """The checks of an engine of ours, over given ids.

    Raises:
        InputError: fewer than two tokens, or tokens that the model cannot take.
    """
    if len(ids) < 2:
        raise InputError("one token cannot be computed in portions.", "Take a longer prompt.", code="prompt")
    if request.chunk < 1:
        raise InputError(f"chunks of {request.chunk} tokens hold nothing.", "Take 1 or more.", code="chunk")
    count = len(ids)
    names = chosen_points(engine, request.points, None)
    whole = _dump(engine, ids, [count], names, "whole")
    options = Options(tolerance=request.tolerance)
    checks = []
    for name, portions in _portions(count, request.chunk).items():
        other = _dump(engine, ids, portions, names, name)
        verdict = compare(other, whole, options)
        suspect, reason = suspected(verdict, _starts(portions))
        checks.append(Check(name, f"{_said(portions)} against a prefill of {count}", verdict, suspect, reason))
    checks.append(_causal(engine, ids, names, options))
    hp = engine.hp
    return Consistency(
        f"{hp.name} · {hp.architecture}, {hp.n_layers} layers · {engine.backend.device}",
        tuple(checks),
        ("padding and batches of several prompts: our engine computes one sequence at a time",),
    )


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


def _dump(engine: Transformer, ids: Sequence[int], portions: Sequence[int], names: Sequence[str], path: str) -> Dump:
    kept = _Kept()
    sequence = engine.start()
    with Capture(kept, names, engine.backend) as tap:
        start = 0
        for portion in portions:
            engine.forward(ids[start : start + portion], sequence, tap)
            start += portion
    header = Header(
        source="engine",
        model=engine.model.info,
        tokens=tuple(ids),
        mode="exact",
        compute="f32",
        kv_type="f32",
    )
    return Dump(path, header, {name: Rows.stack(parts) for name, parts in kept.parts.items()})


def _causal(engine: Transformer, ids: Sequence[int], names: Sequence[str], options: Options) -> Check:
    """The last token exchanged: no position before it may notice."""
    count = len(ids)
    other = (*ids[:-1], (ids[-1] + 1) % engine.hp.n_vocab)
    changed = _before(_dump(engine, other, [count], names, "another last token"), count - 1, ids)
    verdict = compare(changed, _before(_dump(engine, ids, [count], names, "whole"), count - 1, ids), options)
    suspect = "" if verdict else MASK
    reason = "" if verdict else "earlier positions see a later token: no causal mask, or one that is off by one"
    return Check("another last token", "all positions before a last token that was exchanged", verdict, suspect, reason)


def _before(dump: Dump, stop: int, ids: Sequence[int]) -> Dump:
    points = {name: rows.take(rows.token_idx < stop) for name, rows in dump.points.items()}
    header = None if dump.header is None else Header(**{**dump.header.__dict__, "tokens": tuple(ids)})
    return Dump(dump.path, header, points)


def suspected(verdict: Verdict, starts: NDArray[np.int64]) -> tuple[str, str]:
    """What to suspect where a comparison of portions fails, and a sentence; nothing where it doesn't.

    Args:
        starts: the first positions of the portions, int64.
    """
    first = verdict.first_divergence
    if verdict or first is None:
        return "", ""
    origins = [parse(origin.first.checkpoint).kind for origin in verdict.origins] or [parse(first.checkpoint).kind]
    found = [_BY_KIND[kind] for kind in origins if kind in _BY_KIND]
    at = f"first at {first.checkpoint}, position {first.token_idx}"
    if found:
        return found[0], f"{_WORDS[found[0]]} ({at})"
    if first.token_idx < int(starts[1] if len(starts) > 1 else 0) or parse(first.checkpoint).kind in _ROWWISE:
        return BATCH, f"{_WORDS[BATCH]} ({at})"
    later = "cache, positions or mask"
    return later, f"right within the first portion, wrong behind it ({at}): --points all tells which of them"


_ROWWISE = ("attn_norm", "q", "k", "v", "attn_out", "ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out")


def two_dumps(request: ConsistencyRequest, left: Path, right: Path) -> Consistency:
    """Two dumps of a foreign engine over the same tokens, computed in different portions.

    Raises:
        DumpError: a dump cannot be read, or both were computed in the same portions.
    """
    a, b = load(left, request.mapping), load(right, request.mapping)
    passes = [_passes(dump) for dump in (a, b)]
    if passes[0] == passes[1]:
        raise DumpError(
            f"{left.name} and {right.name} were computed in the same portions ({_said(passes[0])}).",
            "Dump once with the prompt in one pass and once with decode steps or chunks, and record `step`.",
            code="portions",
        )
    verdict = compare(a, b, Options(compute=request.compute, tolerance=request.tolerance))
    finer = max(passes, key=len)
    suspect, reason = suspected(verdict, _starts(finer))
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
