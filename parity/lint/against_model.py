"""Rules that need the model file: other tokens' embeddings, late captures, a header that contradicts it."""

from collections.abc import Iterator

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.lint import ERROR
from checkpoints.points import EMBD, LOGITS, OUTPUT_NORM, in_layer, parse
from checkpoints.record import Rows, Token
from reports.numbers import clean

from .model_facts import ModelFacts
from .rule import TELLING, Hit, Subject, leading, telling, where

Floats = NDArray[np.float32]
# Least cosine of two equal rows: float16 and 4-bit values keep 1 - 1e-3, other tokens' embeddings are far below.
_SAME_DIRECTION = 0.995
# Normalised rows agree to rounding: bf16's relative 2^-9 leaves 1 - 2e-6 at most. Other layers' outputs do not: measured at most
# 0.9989 over 16 values and 0.9981 over whole rows, embedded model (1,300 positions) and six synthetic ones.
_SAME_NORM = 1 - 3e-6


# An engine that is led along the reference's choices may rank another id first if two are nearly equal. Measured: ahead by 0.11 at
# most (native mode, Q8_0, Q4_0 and Q2_K, 64 tokens after each of four prompts). Sampling soon takes ids that are further behind.
_BEHIND = 0.5


_OF_A_NORM = frozenset({"RMS_NORM", "NORM", "MUL", "ADD"})


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else 0.0


_ADDED_TO_EMBEDDING = frozenset({"position_embd.weight", "token_types.weight", "token_embd_norm.weight", "hrm.z_l_init"})


def embedding_row(subject: Subject) -> Iterator[Hit]:
    """The embedding at a position is another token's than the tokens say."""
    model, rows = subject.model, subject.points.get(EMBD)
    if model is None or rows is None or rows.indices is not None or "token_embd.weight" not in model.model.tensors:
        return
    if "enc.output_norm.weight" in model.model.tensors:  # the tokens are the encoder's: the decoder begins with a start token
        return
    if _ADDED_TO_EMBEDDING & model.model.tensors.keys():  # then the layers' input is not a row of the table
        return
    usable = telling(rows)
    wrong: list[tuple[int, int]] = []
    for r in usable.nonzero()[0].tolist():
        position = int(rows.token_idx[r])
        token = subject.ids.get(position) if rows.seq[r] == 0 else None
        row = leading(rows, r)
        if token is None or not 0 <= token < model.hp.n_vocab or not np.isfinite(row).all() or len(row) > model.hp.n_embd:
            continue
        wanted = model.embeddings([token], len(row))[0]
        if _cosine(row.astype(np.float64), wanted.astype(np.float64)) < _SAME_DIRECTION:
            wrong.append((position, r))
    if not wrong:
        return
    position, r = wrong[0]
    nearest, cosine = model.nearest_token(leading(rows, r))
    evidence = f"tokens says {subject.ids[position]} at position {position}, the row is "
    evidence += f"token {nearest}'s" if cosine > _SAME_DIRECTION else "no token's embedding"
    more = f"; the same at {len(wrong)} positions in total" if len(wrong) > 1 else ""
    yield Hit(EMBD, position, evidence + more)


def late_capture(subject: Subject) -> Iterator[Hit]:
    """`output_norm` is the RMSNorm of a value that is named after another layer."""
    model, final = subject.model, subject.points.get(OUTPUT_NORM)
    weight = model.output_norm() if model is not None else None
    if model is None or final is None or final.indices is not None or weight is None:
        return
    last = in_layer(model.hp.n_layers - 1, "l_out")
    if not _norms(subject, last):
        return
    lasts = dict(_placed(subject.points.get(last)))
    normed = {place: row for (place, row), tells in zip(_placed(final), telling(final).tolist(), strict=True) if tells}
    streams = [name for name in subject.points if name != last and (name == EMBD or parse(name).kind == "l_out")]
    final_of_last = any(place in normed and _is_normed(row, None, weight, normed[place]) for place, row in lasts.items())
    late: list[tuple[str, int]] = []
    for name in streams:
        judged = [(place, row) for place, row in _placed(subject.points[name]) if place in normed]
        of_the_last = [
            (place, row)
            for place, row in judged
            if _is_normed(row, lasts.get(place), weight, normed[place]) and not _is_embedding(subject, model, place[1], row)
        ]
        # A mixture of several layers' outputs, which is normed in some models, is nearly one layer's at single positions.
        if final_of_last:
            of_the_last = [(place, row) for place, row in of_the_last if _same_as(row, lasts.get(place))]
        elif lasts and len(of_the_last) < len(judged):
            continue
        late.extend((name, place[1]) for place, _ in of_the_last)
    if late:
        names = list(dict.fromkeys(name for name, _ in late))
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        positions = [position for _, position in late]
        evidence = f"these values are {last}, not {shown} ({OUTPUT_NORM} is the norm of them), {where(positions)}"
        yield Hit(names[0], min(positions), evidence)


def _norms(subject: Subject, last: str) -> bool:
    """Whether, as far as is known, the final norm reads this value: some models mix the outputs of several layers before it."""
    reads: tuple[str, ...] = (OUTPUT_NORM,)
    while len(reads) == 1 and reads[0] != last and (how := subject.computation(reads[0])) is not None and how.op in _OF_A_NORM:
        reads = how.reads
    return len(reads) == 1


def _placed(rows: Rows | None) -> Iterator[tuple[tuple[int, int, int], Floats]]:
    """The leading values of each (sequence, position, pass); none where elements are listed by index."""
    if rows is None or rows.indices is not None:
        return
    places = zip(rows.seq.tolist(), rows.token_idx.tolist(), rows.step.tolist(), strict=True)
    yield from ((place, leading(rows, number)) for number, place in enumerate(places))


def _is_normed(row: Floats, last: Floats | None, weight: Floats, normed: Floats) -> bool:
    """Whether `normed` is the norm of this row, and not of the last layer's."""
    width = min(len(row), len(normed), len(weight))
    if width < TELLING or not (np.isfinite(row[:width]).all() and np.isfinite(normed[:width]).all()):
        return False
    normal = normed[:width].astype(np.float64)
    expected = row[:width].astype(np.float64) * weight[:width]
    return _cosine(expected, normal) > _SAME_NORM and not _is_another(row, last, weight, normal)


def _same_as(row: Floats, last: Floats | None) -> bool:
    """Whether these are the last layer's values, if they were recorded: the same memory is the same to the bit."""
    return last is None or np.array_equal(row, last)


def _is_another(row: Floats, last: Floats | None, weight: Floats, normal: NDArray[np.float64]) -> bool:
    """Whether the last layer's output was recorded as another vector, of which `normal` is the norm as well: where the last layers add
    next to nothing, the outputs before them have nearly the same direction.
    """
    if last is None or len(last) != len(row) or _same_as(row, last):
        return False
    width = len(normal)
    return _cosine(last[:width].astype(np.float64) * weight[:width], normal) > _SAME_NORM


def _is_embedding(subject: Subject, model: ModelFacts, position: int, row: Floats) -> bool:
    """Whether the values really are the token's embedding: then the layers do nothing, and nothing was captured late."""
    token = subject.ids.get(position)
    if token is None or not 0 <= token < model.hp.n_vocab:
        return False
    wanted = model.embeddings([token], len(row))[0]
    return _cosine(row.astype(np.float64), wanted.astype(np.float64)) > _SAME_DIRECTION


_METADATA_NAMES = {
    "eps": ("eps", "epsilon", "norm_eps", "rms_norm_eps", "layer_norm_rms_epsilon", "f_norm_rms_eps"),
    "n_heads": ("heads", "n_heads", "n_head", "num_heads", "num_attention_heads", "head_count"),
    "n_kv_heads": ("kv_heads", "n_kv_heads", "n_head_kv", "num_kv_heads", "num_key_value_heads", "head_count_kv"),
    "n_vocab": ("vocab", "n_vocab", "vocab_size"),
    "n_embd": ("embd", "n_embd", "hidden_size", "embedding_length", "width"),
    "n_ff": ("ff", "n_ff", "intermediate_size", "feed_forward_length"),
    "n_layers": ("layers", "n_layers", "n_layer", "num_hidden_layers", "block_count"),
    "head_size": ("head_size", "head_dim"),
    "rope_base": ("rope_base", "rope_theta", "rope_freq_base", "freq_base"),
    "rope_dims": ("rope_dims", "rope_dimension_count"),
}


def hyperparameters(subject: Subject) -> Iterator[Hit]:
    """The header's hyperparameters contradict the model file's."""
    model, header = subject.model, subject.dump.header
    if model is None or header is None:
        return
    stated = {str(name).lower(): value for name, value in (header.hparams or {}).items()}
    if header.model.layers is not None:
        stated.setdefault("layers", header.model.layers)
    for field, names in _METADATA_NAMES.items():
        wanted = getattr(model.hp, field)
        for name in names:
            value = stated.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value - wanted) > 1e-5 * abs(wanted):
                yield Hit(None, None, f"hparams say {clean(name)} {value:g}, the model file {wanted:g}")
    if header.model.fingerprint and not replace(header.model, twin="").may_be(model.model.info):
        yield Hit(None, None, f"the dump is of another file than {clean(model.model.path.name)} (fingerprints differ)")
    outside = [token for token in header.tokens if not 0 <= token < model.hp.n_vocab]
    if outside:
        yield Hit(None, None, f"token {outside[0]} is outside the vocabulary of {model.hp.n_vocab}", ERROR)


def choice(subject: Subject) -> Iterator[Hit]:
    """The chosen id is not the largest logit's."""
    rows = subject.points.get(LOGITS)
    whole: dict[tuple[int, int], int] = {}  # (sequence, position) with a whole row of logits -> the row's number
    if rows is not None:
        whole = {(int(rows.seq[r]), int(rows.token_idx[r]) + 1): r for r in rows.full().nonzero()[0].tolist()}
    wrong: list[str] = []
    first: int | None = None
    for token in subject.dump.tokens:
        r = whole.get((token.seq, token.token_idx))
        best, shortfall = _in_list(token) if rows is None or r is None else _in_row(token.id, leading(rows, r))
        if shortfall > _BEHIND:
            first = token.token_idx if first is None else first
            wrong.append(f"id {token.id} was chosen for position {token.token_idx}, but the largest logit is that of {best}")
    if wrong:
        yield Hit(LOGITS, first, wrong[0] + (f"; the same for {len(wrong)} tokens in total" if len(wrong) > 1 else ""))


def _in_row(number: int, row: NDArray[np.float32]) -> tuple[int, float]:
    """The id of the largest logit, and how far the chosen one is behind it; NaN if the row does not show it."""
    if not len(row) or not np.isfinite(row).all():
        return -1, np.nan
    return int(row.argmax()), float(row.max() - row[number]) if 0 <= number < len(row) else np.inf


def _in_list(token: Token) -> tuple[int, float]:
    """`_in_row` for the largest logits that a token record lists: an id that is not among them ranks behind the last one."""
    logits = dict(token.top)
    if not logits or not np.isfinite(list(logits.values())).all():
        return -1, np.nan
    best = max(logits, key=lambda number: (logits[number], -number))
    if token.id in logits:
        return best, logits[best] - logits[token.id]
    return best, logits[best] - min(logits.values()) if len(logits) > 1 else np.inf
