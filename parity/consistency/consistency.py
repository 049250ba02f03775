"""An engine compared with itself: the same positions computed in other portions must give the same values."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.consistency import Check, Consistency
from checkpoints.answers.diff import Verdict
from checkpoints.errors import DumpError, InputError
from checkpoints.formats import load
from checkpoints.gguf_file import contents
from checkpoints.points import parse
from checkpoints.record import Dump, Header
from engine.engine import Engine, whole_input
from engine.graph import sees_later
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from reference.client import Reference

from ..arbiter.arbiter import Arbiter
from ..arbiter.encoder_decoder import EncoderDecoderArbiter
from ..arbiter.third_side import AnyArbiter
from ..diff.compare import Options, compare
from ..diff.uncompared import uncompared
from ..run.command import PORTIONS, SEQUENCES, STATE, UBATCH, EngineError
from ..run.request import Prompt, Request
from ..run.session import comparison_options, resolve_prompt
from ..run.sides import OURS, ExternalEngine, OurEngine, Side, recorded, side_of

CACHE, POSITIONS, MASK, BATCH = "cache", "positions", "mask", "batch size"
OTHERS, SAVED = "sequences", "state"
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
    OTHERS: "a prompt gives other values in a batch: padding or other sequences' rows are seen, or positions are counted across sequences",
    SAVED: "the saved state is incomplete or restored to other places: keys, values, positions",
    BATCH: "the same row gives other values among other rows: a kernel depends on the number of tokens",
}
_HOW_TO_STEP = 'Record the number of the pass: "step" in a line, parity_pass in C.'
_DECODER = "dec.output_norm.weight"  # a tensor of every encoder–decoder
_BY_WAY = {SEQUENCES: OTHERS, STATE: SAVED}
_ROWWISE = ("attn_norm", "q", "k", "v", "attn_out", "ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out")


class ConsistencyRequest(Struct, frozen=True):
    """The request of `parity consistency`; with two dumps, an external engine's, only `run`'s mapping and limits matter."""

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
        # The decoder is led along the prompt, in as many positions.
        if _DECODER in {tensor.name for tensor in contents(run.model).tensors}:
            prompt = replace(prompt, decoded=prompt.ids[:-1])
        vocabulary = GgufModel(run.model).hyperparameters.n_vocab  # a file need not have a tokenizer
        return of_side(side, replace(prompt, text=None), request, vocabulary)


def of_side(side: Side, prompt: Prompt, request: ConsistencyRequest, vocabulary: int) -> Consistency:
    """The checks of a side over a prompt; `vocabulary` is the number of token ids.

    Raises:
        InputError: fewer than two tokens, or tokens that the model does not accept.
    """
    count = len(prompt.ids)
    if count < 2:
        raise InputError("one token cannot be computed in portions.", "Take a longer prompt.", code="prompt")
    side.check(prompt)
    run = request.run
    options = comparison_options(run)
    if isinstance(side, OurEngine):  # GELU's table is coarse: float64 tells how far two right passes may be apart
        options = replace(options, truth=_truth(side.engine, prompt, run.first_position))
    ways = _possible_ways(side, prompt)
    not_checked = [f"{subject}: {_untold(side, way)}" for way, subject in _WAYS.items() if way not in ways]
    with TemporaryDirectory(prefix="parity-consistency-") as folder:

        def dumped(prompt: Prompt) -> Dump:
            out = Path(folder) / "dump.jsonl"
            side.dump(prompt, out)
            return recorded(side, out, prompt, run.mapping)

        whole = dumped(prompt)
        checks, refused = _in_other_ways(side, dumped, whole, prompt, _ways(ways, prompt, request.chunk), options)
        not_checked += refused
        if isinstance(side, OurEngine) and sees_later(side.engine.steps):
            not_checked.append("another last token: in an encoder every position sees all others")
        else:
            other = dumped(_another_last(prompt, vocabulary))
            causal = _causal(other, whole, prompt.ids, options)
            checks.append(causal if causal.verdict is None else replace(causal, verdict=_held_to(side, causal.verdict)))
    if not checks:
        raise whole_input()
    return Consistency(_described(side, whole), tuple(checks), tuple(not_checked))


def _possible_ways(side: Side, prompt: Prompt) -> frozenset[str]:
    """The ways of computing that a side knows for a prompt.

    Raises:
        InputError: an engine would have to know what an encoder–decoder's decoder reads.
    """
    if not prompt.decoded or isinstance(side, OurEngine):
        return side.ways
    if isinstance(side, ExternalEngine):
        raise InputError(
            "--exec cannot tell an engine which tokens the decoder of an encoder–decoder reads.",
            "Dump the decoder's tokens twice, in one pass and one by one: parity consistency A B.",
            code="encoder-decoder",
        )
    return side.ways & {PORTIONS}


def _in_other_ways(
    side: Side,
    dumped: Callable[[Prompt], Dump],
    whole: Dump,
    prompt: Prompt,
    ways: Iterable[tuple[str, Prompt, str]],
    options: Options,
) -> tuple[list[Check], list[str]]:
    """The prompt computed in each of these ways against the whole, and sentences on what could not be checked."""
    checks: list[Check] = []
    not_checked: list[str] = []
    unconfirmed = False
    for name, way, description in ways:
        try:
            dump = dumped(way)
            verdict = _held_to(side, compare(dump, whole, options))
        except EngineError:
            raise
        except InputError as error:
            # A model that llama.cpp cannot compute this way: an encoder, recurrent states in a batch.
            not_checked.append(f"{name}: {error.message}")
            continue
        foreign = isinstance(side, ExternalEngine) and bool(verdict)
        unconfirmed = unconfirmed or (foreign and bool(way.portions) and _passes(dump) != list(way.portions))
        suspect, reason = suspected(verdict, _starts(way.portions or (way.saved, len(prompt.ids))), way=_way_of(way))
        title = f"{description} against {_whole(prompt)}"
        checks.append(Check(name, title, verdict, suspect, reason, first_to_differ(verdict)))
    if unconfirmed:
        not_checked.append(f"whether {side.name} takes {PORTIONS}: its dumps show other passes. {_HOW_TO_STEP}")
    return checks, not_checked


_WAYS = {
    PORTIONS: "portions", UBATCH: "ubatch sizes", SEQUENCES: "several sequences in a batch", STATE: "saved and restored state",
}  # fmt: skip


_OURS = {
    UBATCH: "does not cut a pass further",
    SEQUENCES: "keeps one sequence on the device in this mode",
    STATE: "keeps its state on the device in this mode",
}


def _held_to(side: Side, verdict: Verdict) -> Verdict:
    """The verdict, with the points that an external engine was asked for and printed in neither way."""
    if not isinstance(side, ExternalEngine) or not side.requested:
        return verdict
    compared = {point.checkpoint for point in verdict.points}
    return replace(verdict, uncompared=uncompared(side.requested, compared, verdict.uncompared.positions, ()))


def _untold(side: Side, way: str) -> str:
    """Why a way of computing is not checked."""
    if isinstance(side, OurEngine):
        return f"{side.name} {_OURS[way]}"
    if isinstance(side, ExternalEngine):
        return f"{side.name} is not told about them; put {way} into --exec"
    return f"{side.name} encodes a prompt at once, and a state does not hold what came of it"


def _truth(engine: Engine, prompt: Prompt, first: int) -> AnyArbiter:
    if isinstance(engine, Transformer) and engine.encoder is not None:
        return EncoderDecoderArbiter(engine, prompt.ids, prompt.decoded)
    return Arbiter.of(engine, prompt.ids, first)


def _whole(prompt: Prompt) -> str:
    return f"{'the decoder over' if prompt.decoded else 'a prefill of'} {len(prompt.ids)}"


def _another_last(prompt: Prompt, vocabulary: int) -> Prompt:
    """The prompt with another last token, of those that come one after the other."""
    if prompt.decoded:
        return replace(prompt, decoded=(*prompt.decoded[:-1], (prompt.decoded[-1] + 1) % vocabulary))
    return replace(prompt, ids=(*prompt.ids[:-1], (prompt.ids[-1] + 1) % vocabulary), pieces=())


def _ways(ways: Collection[str], prompt: Prompt, chunk: int) -> Iterator[tuple[str, Prompt, str]]:
    """(name, the prompt computed another way, a description), for each way that the side supports."""
    ids, count = prompt.ids, len(prompt.ids)
    if PORTIONS in ways:
        for name, portions in _portions(count, chunk).items():
            yield name, replace(prompt, portions=tuple(portions)), _portions_text(portions)
    if UBATCH in ways:
        for size in dict.fromkeys((1, chunk)):
            if size < count:
                yield f"ubatches of {size}", replace(prompt, ubatch=size), f"a pass in ubatches of {size}"
    if SEQUENCES in ways:  # a shorter one, the same one, a longer one
        companions = (ids[: (count + 1) // 2], ids, (*ids, *ids[: (count + 1) // 2]))
        yield (
            "among other sequences",
            replace(prompt, companions=companions),
            "the last of four sequences, one of them the same,",
        )
    if STATE in ways:
        saved = count // 2
        yield (
            "a restored state",
            replace(prompt, saved=saved),
            f"{saved} tokens, a state that is saved and restored, {count - saved} more,",
        )


def _way_of(prompt: Prompt) -> str:
    return SEQUENCES if prompt.companions else STATE if prompt.saved else UBATCH if prompt.ubatch else PORTIONS


def first_to_differ(verdict: Verdict) -> str:
    """The first point, in dataflow order, at which any value differs: the first operation that depends on something irrelevant."""
    differing = (point for point in verdict.points if point.worst.nmse or point.worst.max_abs)
    return next((point.checkpoint for point in differing), "")


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


def _portions_text(portions: Sequence[int]) -> str:
    if len(set(portions)) == 1 and len(portions) > 1:
        return f"{len(portions)} × {portions[0]}"
    return " + ".join(map(str, portions)) if len(portions) <= 4 else f"{portions[0]} + … + {portions[-1]}"


def _causal(other: Dump, whole: Dump, ids: Sequence[int], options: Options) -> Check:
    """The last token exchanged: no earlier position may change."""
    stop = len(ids) - 1
    verdict = compare(_before(other, stop, ids), _before(whole, stop, ids), options)
    suspect = "" if verdict else MASK
    reason = "" if verdict else "earlier positions see a later token: no causal mask, or one that is off by one"
    return Check("another last token", "the last token exchanged", verdict, suspect, reason, first_to_differ(verdict))


def _before(dump: Dump, stop: int, ids: Sequence[int]) -> Dump:
    points = {name: rows.take(rows.token_idx < stop) for name, rows in dump.points.items()}
    points = {name: rows for name, rows in points.items() if len(rows)}
    header = None if dump.header is None else replace(dump.header, tokens=tuple(ids), pieces=())
    return replace(dump, header=header, points=points)


_ALL_POINTS = "--points all tells which of them"
_MORE_POINTS = "dumps of q_rope, k_rope, kq_soft_max and kqv_out would show which of them"


def suspected(verdict: Verdict, starts: NDArray[np.int64], advice: str = _ALL_POINTS, way: str = PORTIONS) -> tuple[str, str]:
    """What to suspect if a comparison of portions fails, and a sentence; empty if it does not.

    Args:
        starts: the first positions of the portions, int64.
        advice: what would decide, if the recorded points leave it open.
        way: how the other side was computed: the placeholder that requests it.
    """
    first = verdict.first_divergence
    if verdict or first is None:
        return "", ""
    kinds = [parse(origin.first.checkpoint).kind for origin in verdict.origins] or [parse(first.checkpoint).kind]
    suspects = [_BY_KIND[kind] for kind in kinds if kind in _BY_KIND]
    at = f"first at {first.checkpoint}, position {first.token_idx}"
    if way in _BY_WAY:
        return _BY_WAY[way], f"{_WORDS[_BY_WAY[way]]} ({at})"
    if suspects:
        return suspects[0], f"{_WORDS[suspects[0]]} ({at})"
    if first.token_idx < int(starts[1] if len(starts) > 1 else 0) or parse(first.checkpoint).kind in _ROWWISE:
        return BATCH, f"{_WORDS[BATCH]} ({at})"
    later = "cache, positions or mask"
    return later, f"right within the first portion, wrong after it ({at}): {advice}"


def two_dumps(request: ConsistencyRequest, left: Path, right: Path) -> Consistency:
    """Two dumps of an external engine over the same tokens, computed in different portions.

    Raises:
        DumpError: a dump cannot be read, or both were computed in the same portions.
    """
    a, b = load(left, request.run.mapping), load(right, request.run.mapping)
    passes = [_passes(dump) for dump in (a, b)]
    if passes[0] == passes[1]:
        raise DumpError(
            f"{left.name} and {right.name} were computed in the same portions ({_portions_text(passes[0])}).",
            f"Dump once with the prompt in one pass and once with decode steps or chunks. {_HOW_TO_STEP}",
            code="portions",
        )
    verdict = compare(a, b, comparison_options(request.run))
    finer = max(passes, key=len)
    suspect, reason = suspected(verdict, _starts(finer), _MORE_POINTS)
    source = (a.header or b.header or Header("")).source
    check = Check(
        "two dumps",
        f"{left.name} ({_portions_text(passes[0])}) against {right.name} ({_portions_text(passes[1])})",
        verdict,
        suspect,
        reason,
        first_to_differ(verdict),
    )
    return Consistency(
        source or "a foreign engine", (check,), ("padding and batches: dump these and compare them with `parity diff`",)
    )


def _passes(dump: Dump) -> list[int]:
    """How many positions each forward pass had, in order: from the point with the most records."""
    rows = max(dump.points.values(), key=len)
    return [int(n) for n in np.unique(rows.step, return_counts=True)[1]]
