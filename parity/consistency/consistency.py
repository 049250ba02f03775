"""An engine compared with itself: the same positions computed in other portions must give the same values."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.consistency import Check, Consistency
from checkpoints.answers.diff import Verdict
from checkpoints.errors import InputError
from checkpoints.gguf_file import contents
from checkpoints.record import Dump
from engine.engine import Engine, whole_input
from engine.graph import sees_later
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from reference.client import Reference

from ..arbiter.arbiter import Arbiter
from ..arbiter.encoder_decoder import EncoderDecoderArbiter
from ..arbiter.third_side import AnyArbiter
from ..diff.compare import Options, compare
from ..diff.measured.uncompared import uncompared
from ..run.command import PORTIONS, EngineError
from ..run.request import Prompt, Request
from ..run.session import comparison_options, resolve_prompt
from ..run.sides import OURS, ExternalEngine, OurEngine, Side, recorded, side_of
from .suspects import MASK, first_to_differ, suspected
from .two_dumps import HOW_TO_STEP, passes_of, stated, two_dumps
from .ways import WAYS, described_whole, other_ways, possible_ways, starts_of, way_of, why_not, with_another_last

_DECODER = "dec.output_norm.weight"  # a tensor of every encoder–decoder


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
        return two_dumps(request.run, *request.dumps)
    if request.chunk < 1:
        raise InputError(f"--chunk must be at least 1, not {request.chunk}.", "Use 1 or more.", code="chunk")
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
        raise InputError("one token cannot be computed in portions.", "Use a longer prompt.", code="prompt")
    side.check(prompt)
    run = request.run
    options = comparison_options(run)
    if isinstance(side, OurEngine):  # GELU's table is coarse: float64 tells how far two right passes may be apart
        options = replace(options, truth=_truth(side.engine, prompt, run.first_position))
    ways = possible_ways(side, prompt)
    not_checked = [f"{subject}: {why_not(side, way)}" for way, subject in WAYS.items() if way not in ways]
    with TemporaryDirectory(prefix="parity-consistency-") as folder:

        def dumped(prompt: Prompt) -> Dump:
            out = Path(folder) / "dump.jsonl"
            side.dump(prompt, out)
            return stated(recorded(side, out, prompt, run.mapping), run.compute)

        whole = dumped(prompt)
        checks, refused = _in_other_ways(side, dumped, whole, prompt, other_ways(ways, prompt, request.chunk), options)
        not_checked += refused
        if isinstance(side, OurEngine) and sees_later(side.engine.steps):
            not_checked.append("another last token: in an encoder every position sees all others")
        else:
            other = dumped(with_another_last(prompt, vocabulary))
            causal = _causal(other, whole, prompt.ids, options)
            checks.append(causal if causal.verdict is None else replace(causal, verdict=_held_to(side, causal.verdict)))
    if not checks:
        raise whole_input()
    return Consistency(_described(side, whole), tuple(checks), tuple(not_checked))


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
            verdict = _after(way.saved, _held_to(side, compare(dump, whole, options)))
        except EngineError:
            raise
        except InputError as error:
            # A model that llama.cpp cannot compute this way: an encoder, recurrent states in a batch.
            not_checked.append(f"{name}: {error.message}")
            continue
        foreign = isinstance(side, ExternalEngine) and bool(verdict)
        unconfirmed = unconfirmed or (foreign and bool(way.portions) and passes_of(dump) != list(way.portions))
        suspect, reason = suspected(verdict, starts_of(way.portions or (way.saved, len(prompt.ids))), way=way_of(way))
        title = f"{description} against {described_whole(prompt)}"
        checks.append(Check(name, title, verdict, suspect, reason, first_to_differ(verdict)))
    if unconfirmed:
        not_checked.append(f"whether {side.name} takes {PORTIONS}: its dumps show other passes. {HOW_TO_STEP}")
    return checks, not_checked


def _after(saved: int, verdict: Verdict) -> Verdict:
    """The verdict of a run that continued from a state: it computes no position below `saved`, so that none is lacking there."""
    lacks = verdict.uncompared
    return replace(verdict, uncompared=replace(lacks, positions=tuple(at for at in lacks.positions if at >= saved)))


def _held_to(side: Side, verdict: Verdict) -> Verdict:
    """The verdict, with the points that an external engine was asked for and printed in neither way."""
    if not isinstance(side, ExternalEngine) or not side.requested:
        return verdict
    compared = {point.checkpoint for point in verdict.points}
    return replace(verdict, uncompared=uncompared(side.requested, compared, verdict.uncompared.positions, ()))


def _truth(engine: Engine, prompt: Prompt, first: int) -> AnyArbiter:
    if isinstance(engine, Transformer) and engine.encoder is not None:
        return EncoderDecoderArbiter(engine, prompt.ids, prompt.decoded)
    return Arbiter.of(engine, prompt.ids, first)


def _described(side: Side, whole: Dump) -> str:
    header = whole.header
    if header is None or not header.model.architecture:
        return side.name
    model = header.model
    device = header.build.get("device") or header.build.get("backend", "")
    described = f"{model.name} · {model.architecture}, {model.layers} layers"
    return " · ".join(filter(None, [side.name, described, device]))


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
