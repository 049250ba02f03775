"""Are the two dumps of the same experiment? Compares models, prompts and token ids before any number."""

from math import inf
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.diff import Difference, Pattern
from checkpoints.errors import DumpError, InputError
from checkpoints.points import EMBD
from checkpoints.record import Dump, ModelInfo

TOKENS = "tokens"


class TokenComparison(Struct, frozen=True):
    """Where the token sequences diverge.

    `until`: records at this position and later are left out (None: all are compared). `divergence` and `pattern`: the prompt
    ids differ, which is a divergence by itself; different generated ids are not.
    """

    until: int | None = None
    divergence: Difference | None = None
    pattern: Pattern | None = None
    notes: tuple[str, ...] = ()


SAME = TokenComparison()  # no difference of the tokens is known


def too_few_tokens(dump: Path | str, position: int, count: int, *, decoder: bool) -> DumpError:
    """The error of a dump with records of a position beyond its `count` known tokens.

    `decoder`: they are an encoder–decoder's after the start token, which only the dump says: --tokens is the encoder's prompt.
    """
    line = '{"type": "token", "token_idx": 1, "id": 42}'
    return DumpError(
        f"{dump} has records of position {position}, but only {count} {'token is' if count == 1 else 'tokens are'} known.",
        f"Add a line for each token that the decoder generated, such as {line}; --tokens are the encoder's."
        if decoder
        else "Give all of them with --tokens, including the generated ones.",
        code="tokens",
    )


def same_experiment(ours: Dump, ref: Dump) -> None:
    """Raise InputError if the headers name two models or two prompts."""
    left, right = ours.header, ref.header
    if left is None or right is None:
        return
    a, b = left.model, right.model
    if not a.may_be(b):
        raise InputError(
            f"these are dumps of different models: ours of {_model(a.name, a.file_type, a.fingerprint)}, "
            f"the reference of {_model(b.name, b.file_type, b.fingerprint)}.",
            "Dump both sides from one file.",
            code="two-models",
        )
    if left.prompt is not None and right.prompt is not None and left.prompt != right.prompt:
        raise InputError(
            f"these are dumps of different prompts: {_short(left.prompt)} and {_short(right.prompt)}.",
            "Dump both sides with one prompt (`parity dump ref --follow OURS.jsonl` uses ours).",
            code="two-prompts",
        )


def same_model(dump: Dump, path: Path) -> None:
    """Raise InputError if a dump's header names another model than the file; the F32 twin of a model counts as the model.

    Raises:
        ModelError: the file cannot be read as a model.
    """
    known = dump.header.model if dump.header is not None else None
    if known is None or not known.fingerprint:
        return
    from checkpoints.gguf_file import contents

    file = contents(path)
    alike = (file.architecture, file.layers) == (known.architecture, known.layers)
    given = ModelInfo(fingerprint=file.fingerprint, content=file.content)
    if alike and file.text("general.name") in ("", known.name) and file.fingerprint != known.fingerprint:
        return  # a copy of another type, such as the twin
    if not known.may_be(given):
        raise InputError(
            f"{dump.path} was made from {_model(known.name, known.file_type, known.fingerprint)}, not from {path}.",
            "Name the file that the engine ran: --model FILE.",
            code="two-models",
        )


def other_settings(dump: Dump, path: Path) -> tuple[str, ...]:
    """The note that a dump's file states other numbers than the model file, if both are known; raises as `same_model`."""
    from checkpoints.gguf_file import contents

    known = dump.header.model.settings if dump.header is not None else ""
    if not known or known == contents(path).settings:
        return ()
    return (
        f"{dump.path} was made with a file whose metadata differ from {path.name}'s (an epsilon, RoPE's base, …): it is judged by "
        f"{path.name}",
    )


def compare_tokens(ours: Dump, ref: Dump) -> TokenComparison:
    """Compare the token ids, first of the prompt (sequence 0), then those generated (of each sequence)."""
    left = ours.header.tokens if ours.header else ()
    right = ref.header.tokens if ref.header else ()
    if left and right and left != right:
        whole_left, whole_right = _with_generated(ours, left), _with_generated(ref, right)
        # One side may list as its prompt what the other one generated: the ids decide, not where they are listed.
        reach = max(len(left), len(right))
        if whole_left[:reach] != whole_right[:reach]:
            return _prompts(ours, ref, whole_left[:reach], whole_right[:reach])
    chosen = {(token.seq, token.token_idx): token for token in ours.tokens}
    for token in sorted(ref.tokens, key=lambda token: token.token_idx):
        our_token = chosen.get((token.seq, token.token_idx))
        if our_token is not None and our_token.id != token.id:
            sentence = (
                f"the generated tokens differ from position {token.token_idx} on: ours {_piece(our_token.id, our_token.text)}, "
                f"the reference {_piece(token.id, token.text)}"
            )
            return TokenComparison(token.token_idx, notes=(sentence,))
    return TokenComparison()


def own_choice(first: Difference | None, ours: Dump, ref: Dump) -> TokenComparison | None:
    """The divergence of tokens that shows as a wrong embedding: at a token that llama.cpp generated, if ours does not say which it took.

    An engine that chooses for itself computes another text from there on: its choice differs, not its embedding.
    """
    if first is None or first.checkpoint != EMBD:
        return None
    position = first.token_idx
    chosen = next((token for token in ref.tokens if (token.seq, token.token_idx) == (first.seq, position)), None)
    known = ours.header is not None and len(ours.header.tokens) > position
    if chosen is None or known or any(token.token_idx == position for token in ours.tokens):
        return None
    sentence = (
        f"ours continues with a token other than {_piece(chosen.id, chosen.text)}, which llama.cpp chose at position {position}: it "
        "chooses for itself (or reads another row of the embedding)"
    )
    at = replace(first, checkpoint=TOKENS, layer=None, nmse=None, max_abs=None, limit=0.0, of_limit=inf, ours=(), ref=())
    return TokenComparison(position, at, Pattern("own-choice", sentence))


def token_text(ours: Dump, ref: Dump) -> dict[int, str]:
    """Position -> text of its token, if a header or a generated token gives it."""
    texts: dict[int, str] = {}
    for dump in (ours, ref):
        texts.update({token.token_idx: token.text for token in dump.tokens if token.text and token.seq == 0})
        if dump.header is not None:
            texts.update(enumerate(dump.header.pieces))
    return texts


def _with_generated(dump: Dump, prompt: tuple[int, ...]) -> tuple[int, ...]:
    later = {token.token_idx: token.id for token in dump.tokens if token.seq == 0}
    ids = list(prompt)
    while len(ids) in later:
        ids.append(later[len(ids)])
    return tuple(ids)


def _prompts(ours: Dump, ref: Dump, left: tuple[int, ...], right: tuple[int, ...]) -> TokenComparison:
    pairs = zip(left, right, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
    if left == right[1:]:
        pattern = Pattern("bos-missing", f"ours lacks the first token, {_at(ref, right, 0)}: is BOS added?")
    elif right == left[1:]:
        doubled = len(left) > 1 and left[0] == left[1]
        what = "has the first token twice" if doubled else "has an extra token at the start"
        pattern = Pattern(
            "bos-doubled" if doubled else "bos-added",
            f"ours {what}, {_at(ours, left, 0)}: is BOS added to a text that already has it?",
        )
    elif at == min(len(left), len(right)):
        further = left[at:]
        padded = (
            f"; what ours has beyond is id {further[0]} alone: padding belongs in no header" if len(set(further)) == 1 else ""
        )
        pattern = Pattern("token-count", f"ours has {len(left)} tokens, the reference {len(right)}: one side is longer{padded}")
    else:
        pattern = Pattern(
            "tokenizer",
            f"token {at} is {_at(ours, left, at)} in ours, {_at(ref, right, at)} in the reference: the tokenizers differ",
        )
    difference = Difference(
        checkpoint=TOKENS,
        layer=None,
        token_idx=at,
        nmse=None,
        max_abs=None,
        limit=0.0,
        ours=tuple(map(float, left[at : at + 16])),
        ref=tuple(map(float, right[at : at + 16])),
        fresh=True,
        token=_text(ref, at),
    )
    notes = (f"token {at}: ours {_at(ours, left, at)}, reference {_at(ref, right, at)}",)
    return TokenComparison(at, difference, pattern, notes)


def _text(dump: Dump, position: int) -> str | None:
    pieces = dump.header.pieces if dump.header else ()
    return pieces[position] if position < len(pieces) else None


def _at(dump: Dump, ids: tuple[int, ...], position: int) -> str:
    return _piece(ids[position], _text(dump, position)) if position < len(ids) else "nothing"


def _piece(number: int, text: str | None) -> str:
    return f"{number} {text!r}" if text else str(number)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "…")


def _model(name: str, file_type: str, fingerprint: str) -> str:
    return " ".join(part for part in (name or "a model", file_type, f"({fingerprint[:8]})") if part)
