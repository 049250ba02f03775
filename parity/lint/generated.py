"""Generated text that goes in circles."""

from collections.abc import Iterator, Sequence

from checkpoints.record import Token

from .rule import Hit, Subject

# A small model that generates greedily repeats a phrase now and then; only repetition beyond these bounds is reported.
SAME_TOKEN = 8  # the same id this often in a row
REPEATS = 4  # a cycle of two or more ids, this often in a row …
CYCLE_TOKENS = 24  # … and over at least as many tokens
_LONGEST = 64  # longest cycle that is looked for, in ids


def repetition(subject: Subject) -> Iterator[Hit]:
    """The same token again and again, or a cycle of several."""
    for tokens in _generated(subject):
        repeated = cycle([token.id for token in tokens])
        if repeated is None:
            continue
        start, period, length = repeated
        text = "".join(token.text for token in tokens[start : start + period])
        what = f"token {tokens[start].id}" if period == 1 else f"a cycle of {period} tokens"
        shown = f" {text[:40]!r}" if text else ""
        often = f"{length // period} times in a row"
        yield Hit(None, tokens[start].token_idx, f"{what}{shown} comes {often} from position {tokens[start].token_idx} on")


def _generated(subject: Subject) -> Iterator[list[Token]]:
    """The generated tokens of each sequence, in order: token records, and the header's ids at positions of decode steps.

    An engine that was stopped and dumped lists all its tokens in the header; the prompt is the user's and may repeat itself.
    """
    header = subject.dump.header
    listed = header.tokens if header is not None else ()
    pieces = header.pieces if header is not None and len(header.pieces) == len(listed) else ("",) * len(listed)
    decoded = {int(t) for rows in subject.points.values() for t in rows.token_idx[rows.decode & (rows.seq == 0)]}
    known = {(0, t): Token(t, listed[t], pieces[t]) for t in decoded if t < len(listed)}
    known |= {(token.seq, token.token_idx): token for token in subject.dump.tokens}
    for seq in sorted({seq for seq, _ in known}):
        yield [known[place] for place in sorted(known) if place[0] == seq]


def cycle(ids: Sequence[int]) -> tuple[int, int, int] | None:
    """The longest run of a repeating pattern past the bounds, as (start, period, length), the smallest period first."""
    for period in range(1, min(_LONGEST, len(ids) // REPEATS) + 1):
        best, start = (0, 0), 0
        for i in range(period, len(ids) + 1):
            if i == len(ids) or ids[i] != ids[i - period]:
                best = max(best, (i - start, -start))
                start = i - period + 1
        length, begin = best[0], -best[1]
        enough = length >= SAME_TOKEN if period == 1 else length >= max(REPEATS * period, CYCLE_TOKENS)
        if enough:
            return begin, period, length
    return None
