"""An encoder–decoder is explained half by half: the encoder over the prompt, then the decoder over its own tokens.

Each half is a model by itself, with the names of one, so that every fault is planted in it as in any other model. The decoder is given what
the encoder makes: what a faulty encoder makes once its fault is known, so that what it spoils is not held against the decoder.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.explain import Cause, Explanation
from checkpoints.points import ENCODER
from checkpoints.record import Dump
from engine.graph import ENCODED
from engine.halves import handed_over
from engine.transformer import Transformer

from .case import Case, ExplainOptions
from .half_cases import decoder_case, encoder_case
from .rounding.own_inputs import whole
from .search.state import SearchState

_PLAIN_NAME = re.compile(r"(?<![\w.])(?=blk\.|embd\b|output_norm\b)")
_IN_ENCODER, _IN_DECODER = "in the encoder, ", "in the decoder, "
_UNJUDGED = ("the decoder was not judged: it reads what the encoder makes",)
Explained = tuple[Explanation, SearchState]


def explained(
    dump: Dump, transformer: Transformer, options: ExplainOptions, explain: Callable[[Case], Explained]
) -> Explanation:
    """The explanation of an encoder–decoder's dump; `explain` gives that of one half, and the steps that it comes down to.

    Raises:
        ParityError: as `Case` does.
    """
    encoder = encoder_case(dump, transformer, options)
    first, best = (None, None) if encoder is None else explain(encoder)
    first = None if first is None else _of_encoder(first)
    lower = first is not None and encoder is not None and bool(first.precision_only)
    own = _own_output(encoder, transformer) if lower and encoder is not None else None
    decoder = decoder_case(dump, transformer, options, encoder, best, own)
    unexplained = first is not None and first.remaining is not None and not first  # lower arithmetic explains what is left
    if first is not None and (decoder is None or unexplained):
        return replace(first, notes=(*first.notes, *(_UNJUDGED if decoder is not None else ())))
    assert decoder is not None
    second = _of_decoder(explain(decoder)[0], _last(transformer))
    if first is not None and lower and own is None and not (second and not second.causes):
        # What differs in it may be the encoder's arithmetic, or a fault: neither is said.
        notes = (*first.notes, _of_arithmetic(first), *_UNJUDGED, f"record the whole rows of {_last(transformer)}")
        return replace(
            first,
            precision_only="",
            precision_assumed=False,
            precision_alike=(),
            remaining=second.first or second.remaining,
            notes=notes,
        )
    if first is None:
        unrecorded = f"the encoder was not recorded: its faults show where the decoder reads it; record {_last(transformer)}"
        return replace(second, notes=(*second.notes, unrecorded))
    return joined(first, second)


def _own_output(encoder: Case, transformer: Transformer) -> dict[str, NDArray[np.float32]] | None:
    """What the dump's own encoder hands over, [T, n] by name; None where it was not recorded whole."""
    entries = {entry.point: entry for entry in encoder.entries}
    rows = {name: whole(encoder, entries.get(plain)) for name, plain in handed_over(transformer.encoder or ()).items()}
    known = {name: value for name, value in rows.items() if value is not None}
    return known if len(known) == len(rows) else None


def _of_arithmetic(encoder: Explanation) -> str:
    return f"the encoder's differences are those of {encoder.precision_only} arithmetic"


def joined(encoder: Explanation, decoder: Explanation) -> Explanation:
    """One answer for both halves; the encoder's has nothing that its causes leave unexplained."""
    whole = encoder if decoder and (encoder.causes or encoder.first is not None) else decoder
    causes_of_both = _merged(encoder, decoder)
    differing = encoder.differing + decoder.differing
    nearest = [half.nearest for half in (encoder, decoder) if half.nearest is not None]
    notes = (*encoder.notes, *decoder.notes)
    if encoder.precision_only and not decoder:
        notes = (*notes, _of_arithmetic(encoder))
    if decoder.precision_only and encoder.causes:
        notes = (*notes, f"the decoder's own differences are those of {decoder.precision_only} arithmetic")
    return replace(
        whole,
        records=encoder.records + decoder.records,
        differing=differing,
        first=encoder.first if encoder.causes else whole.first,
        last_agreement=encoder.last_agreement if encoder.causes else whole.last_agreement or encoder.seen[-1].checkpoint,
        causes=tuple(replace(cause, explained=cause.records / differing) for cause in causes_of_both),
        precision_only="" if causes_of_both else whole.precision_only,
        faults=max(encoder.faults, decoder.faults),
        variants=encoder.variants + decoder.variants,
        nearest=min(nearest, default=None),
        seconds=encoder.seconds + decoder.seconds,
        complete=encoder.complete and decoder.complete,
        notes=tuple(dict.fromkeys(notes)),
        seen=(*encoder.seen, *decoder.seen),
        passes=(max(encoder.passes[0], decoder.passes[0]), decoder.passes[1]),
    )


def _merged(encoder: Explanation, decoder: Explanation) -> list[Cause]:
    """The causes of both halves; one that all layers of both have is one."""
    causes, others = [], list(decoder.causes)
    for cause in encoder.causes:
        same = next((other for other in others if _same_fault(cause, other)), None)
        if same is None:
            causes.append(cause)
            continue
        others.remove(same)
        sentence = f"in both halves, {cause.named.sentence.removeprefix(_IN_ENCODER)}"
        records, nmse = cause.records + same.records, max(cause.nmse, same.nmse)
        causes.append(replace(cause, named=replace(cause.named, sentence=sentence), records=records, nmse=nmse))
    return [*causes, *others]


def _same_fault(cause: Cause, other: Cause) -> bool:
    left, right = cause.named, other.named
    everywhere = left.layers is None and right.layers is None
    return everywhere and (left.fault, left.parameters) == (right.fault, right.parameters)


def _of_encoder(answer: Explanation) -> Explanation:
    """The encoder's answer with the encoder's own names."""
    named: Explanation = _renamed(answer, lambda text: _PLAIN_NAME.sub(ENCODER, text))
    return _in_half(named, _IN_ENCODER)


def _of_decoder(answer: Explanation, last: str) -> Explanation:
    """The decoder's answer; what it reads of the encoder has the name of what the encoder makes."""
    placed = answer.placed
    if placed is not None:
        placed = replace(placed, operations=tuple(last if name == ENCODED else name for name in placed.operations))
    return _in_half(replace(answer, placed=placed), _IN_DECODER)


def _in_half(answer: Explanation, where: str) -> Explanation:
    """The answer, with causes and leads that say in which half they are."""
    causes = tuple(
        replace(
            cause,
            named=replace(cause.named, sentence=where + cause.named.sentence),
            equivalent=tuple(replace(other, sentence=where + other.sentence) for other in cause.equivalent),
        )
        for cause in answer.causes
    )
    leads = tuple(
        lead if lead.named is None else replace(lead, named=replace(lead.named, sentence=where + lead.named.sentence))
        for lead in answer.leads
    )
    return replace(answer, causes=causes, leads=leads)


def _renamed(value: Any, rename: Callable[[str], str]) -> Any:
    """A value with every text in it renamed."""
    if isinstance(value, str):
        return rename(value)
    if isinstance(value, tuple | list):
        return type(value)(_renamed(part, rename) for part in value)
    if isinstance(value, Struct):
        return replace(value, **{name: _renamed(getattr(value, name), rename) for name in value.__struct_fields__})
    return value


def _last(transformer: Transformer) -> str:
    """The name of what the decoder reads."""
    return next(iter(handed_over(transformer.encoder or ())))
