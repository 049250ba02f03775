"""The generated text as both sides would have written it, token by token."""

from msgspec import Struct

from checkpoints.record import Dump

from .numbers import token as quoted


class Choice(Struct, frozen=True):
    """The token at one position: what each side would choose; `margin` is the distance of the reference's first two logits."""

    position: int
    ours: str
    ref: str
    same: bool
    margin: float | None


def generated(ours: Dump, ref: Dump) -> list[Choice]:
    """Tokens that both sides recorded, of the first sequence; empty where nothing was generated."""
    our_tokens = {token.token_idx: token for token in ours.tokens if token.seq == 0}
    texts = {token.id: token.text for side in (ours, ref) for token in side.tokens if token.text}
    for side in (ours, ref):
        if side.header is not None:
            texts |= dict(zip(side.header.tokens, side.header.pieces, strict=False))
    choices: list[Choice] = []
    for ref_token in sorted((token for token in ref.tokens if token.seq == 0), key=lambda token: token.token_idx):
        other = our_tokens.get(ref_token.token_idx)
        if other is None:
            continue
        a, b = other.first_choice, ref_token.first_choice
        margin = ref_token.top[0][1] - ref_token.top[1][1] if len(ref_token.top) > 1 else None
        choices.append(Choice(ref_token.token_idx, _named(a, texts), _named(b, texts), a == b, margin))
    return choices


def _named(number: int, texts: dict[int, str]) -> str:
    return quoted(texts[number]) if number in texts else f"id {number}"
