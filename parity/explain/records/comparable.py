"""What of a dump can be held beside the right engine's replay: one sequence, rows of positions, and the tokens and passes of these."""

from collections.abc import Sequence

from msgspec.structs import replace

from checkpoints.errors import DumpError
from checkpoints.points import of_scores
from checkpoints.printable import first_names
from checkpoints.record import Dump
from engine.graph import Step, sees_later

from .records import Ints


def rows_of_positions(dump: Dump, steps: Sequence[Step]) -> tuple[Dump, tuple[str, ...]]:
    """The dump without points that the replay has in another form: states after a pass (the replay is one pass), an encoder's scores;
    and a note that names them.

    Also without masks and the like, whose rows are the second of three dimensions although they are not scores, and without nodes of
    llama.cpp's that are no points of ours: of a choice of keys, say, what follows the keys that a position sees may be anything.
    """
    whole = sees_later(steps)
    once = {
        step.makes
        for step in steps
        if step.inner or step.axis is None or (step.axis == 1 and (whole or not of_scores(step.makes)))
    }
    if dump.points.keys() <= once:
        raise DumpError(
            f"{dump.path} has only states after passes.", "Record points that have a row for each position.", code="points"
        )
    left_out = [name for name in dump.points if name in once]
    note = f"left out, because explain compares rows of positions, of one pass: {first_names(left_out)} (parity diff compares them)"
    kept = {name: rows for name, rows in dump.points.items() if name not in once}
    return replace(dump, points=kept), (note,) if left_out else ()


def first_sequence(dump: Dump) -> Dump:
    """The records of sequence 0.

    Raises:
        DumpError: there are none.
    """
    points = {name: rows.take(rows.seq == 0) for name, rows in dump.points.items()}
    kept = {name: rows for name, rows in points.items() if len(rows)}
    if not kept:
        raise DumpError(f"{dump.path} has no record of sequence 0.", "explain looks at one sequence.", code="sequence")
    return replace(dump, points=kept)


def of_prompt(dump: Dump, tokens: tuple[int, ...]) -> Dump:
    """A dump beside the prompt that was given: without records after that prompt, if its header lists more tokens, as when its engine
    doubled BOS or went on by itself; and with a note of the first token that is another one.

    The records of a dump that lists no more tokens are left, since tokens are missing then.
    """
    if dump.header is None or not dump.header.tokens:
        return dump  # generated tokens alone do not say where they begin
    listed = (*dump.header.tokens, *generated_of(dump))
    pairs = enumerate(zip(listed, tokens, strict=False))
    others = [
        f"token {at} is {own} in the dump, {wanted} in the prompt that was given"
        for at, (own, wanted) in pairs
        if own != wanted
    ]
    dump = replace(dump, notes=(*dump.notes, *others[:1]))
    count = len(tokens)
    if len(listed) <= count:
        return dump
    points = {name: rows.take(rows.token_idx < count) for name, rows in dump.points.items()}
    kept = {name: rows for name, rows in points.items() if len(rows)}
    left = sum(map(len, dump.points.values())) - sum(map(len, kept.values()))
    if not kept or not left:
        return dump
    note = f"{left:,} records after the prompt's {count} tokens are left out: the dump lists more tokens"
    return replace(dump, points=kept, notes=(*dump.notes, note))


def tokens_of(dump: Dump, given: tuple[int, ...] | None) -> tuple[int, ...]:
    """The ids of all positions; raises as `prompt_of`."""
    return given if given is not None else (*prompt_of(dump, given), *generated_of(dump))


def prompt_of(dump: Dump, given: tuple[int, ...] | None) -> tuple[int, ...]:
    """The ids that were given, or those that a dump's header says.

    Raises:
        DumpError: neither.
    """
    if given is not None:
        return given
    if dump.header is None or not dump.header.tokens:
        raise DumpError(
            f"{dump.path} does not say which tokens it was recorded for.",
            "Give them: --tokens 1,2,3, or --prompt.",
            code="tokens",
        )
    return dump.header.tokens


def generated_of(dump: Dump) -> tuple[int, ...]:
    """The ids that a dump says were generated, in order."""
    return tuple(number for _, number in sorted((token.token_idx, token.id) for token in dump.tokens if token.seq == 0))


def passes_of(dump: Dump, positions: Ints, prompt: int) -> list[int]:
    """The number of the forward pass of each position: from the records, else 0 for the prompt, then one more for each token."""
    passes = [max(0, row - prompt + 1) for row in range(len(positions))]
    for rows in dump.points.values():
        for token_idx, step in zip(rows.token_idx.tolist(), rows.step.tolist(), strict=True):
            if 0 <= token_idx - int(positions[0]) < len(passes) and step:
                passes[token_idx - int(positions[0])] = step
    return passes
