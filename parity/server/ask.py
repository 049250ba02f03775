"""The questions: what the server predicts at each position of a text (teacher forcing), and what it chooses by itself (greedy)."""

from collections.abc import Callable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from ..run.request import Prompt
from .dialects import Dialect
from .http import ServerError
from .predictions import Prediction, TokenCandidate
from .vocabulary import Vocabulary

Progress = Callable[[str, int, int | None], None]
_AT_ONCE = 512  # most requests of one comparison if each position takes one; in longer texts they are spread out


class PlacedPrediction(Struct, frozen=True):
    """What the server predicted after the tokens up to `position`.

    `chosen` is the token that it chose there, None if the text's own follows; `prefix` is the text that it was given, None if
    it was given the whole text, or ids.
    """

    position: int
    candidates: tuple[TokenCandidate, ...]
    own: TokenCandidate | None = None
    chosen: int | None = None
    prefix: str | None = None


class ServerReply(Struct, frozen=True):
    """Everything that the server answered.

    `tokens` are llama.cpp's ids of the prompt and then those that the server chose; `around` is what it echoed before and after the
    text; `tokenizer` is the first position whose piece differs, with both pieces; `cut` is how many characters of the text the server
    read, where it echoed its beginning only; `stopped` is why it chose fewer tokens than `wanted`, in its own words.
    """

    tokens: tuple[int, ...]
    prompt: int
    placed: tuple[PlacedPrediction, ...]
    echoed: bool
    prompt_tokens: int | None = None
    around: tuple[str, str] | None = None
    tokenizer: tuple[int, str, str] | None = None
    cut: int | None = None
    wanted: int = 0
    stopped: str = ""
    notes: tuple[str, ...] = ()


def ask_server(
    dialect: Dialect,
    prompt: Prompt,
    vocabulary: Vocabulary,
    prefix_ids: Callable[[str], Sequence[int]],
    generate: int,
    progress: Progress | None = None,
    *,
    first: int = 0,
) -> ServerReply:
    """Ask about every position of the prompt from `first` on, then let the server choose `generate` tokens.

    `prefix_ids` tokenizes as llama.cpp does: without echo a position is asked for by the text before it, if that text alone
    has the same tokens.

    Raises:
        ServerError: the server refuses, or gives no candidates.
    """
    given: str | Sequence[int] = prompt.text if prompt.text is not None else prompt.ids
    answer = dialect.complete(given, max(generate, 1), echo=dialect.echoes is not False)
    if not answer.generated and (generate or not answer.prompt):
        raise ServerError(f"the server chose no token after the prompt.{_stopped(answer.text)}", "Use another prompt.")
    reply = ServerReply(
        prompt.ids, len(prompt.ids), (), bool(answer.prompt), answer.prompt_tokens, wanted=generate, stopped=answer.stopped
    )
    reply = (
        _echoed(reply, answer.prompt, prompt, vocabulary)
        if answer.prompt
        else _one_by_one(reply, dialect, prompt, prefix_ids, progress, first)
    )
    return _chosen(reply, answer.generated, vocabulary, generate)


def _stopped(text: str) -> str:
    return f" It answered {text[:40]!r}." if text else ""


def _echoed(reply: ServerReply, predictions: Sequence[Prediction], prompt: Prompt, vocabulary: Vocabulary) -> ServerReply:
    """The answer with predictions of the prompt's own tokens, as far as they are the same as llama.cpp's."""
    text = prompt.text if prompt.text is not None else "".join(prompt.pieces)
    shown = list(predictions)
    before, match, after = "".join(item.token.text for item in shown).partition(text)
    hidden = _hidden(prompt)
    echoed = before + match + after
    if hidden and vocabulary.ids(shown[0].token)[:1] == prompt.ids[:1]:
        hidden = 0  # this server shows its BOS, too
        before = before.removeprefix(shown[0].token.text)
    if match and (before.strip() or after.strip()):
        return replace(reply, around=(before, after))
    echoed = echoed.lstrip()
    if hidden == 0 and prompt.text is not None:
        echoed = echoed.removeprefix(shown[0].token.text)
    if echoed and len(echoed) < len(text.strip()) and text.lstrip().startswith(echoed):
        reply = replace(reply, cut=len(echoed))
    placed: list[PlacedPrediction] = []
    bare = 0
    for index, item in enumerate(shown, hidden):
        if not _is_token(item, index, hidden, prompt, vocabulary):
            return replace(reply, placed=tuple(placed), tokenizer=(index, _piece(prompt, index), item.token.text))
        if item.candidates and index > 0:
            placed.append(PlacedPrediction(index - 1, item.candidates, item.token))
        elif index > 1:  # nothing precedes the first token that is shown
            bare += 1
    if len(shown) + hidden < len(prompt.ids):
        index = len(shown) + hidden
        return replace(reply, placed=tuple(placed), tokenizer=(index, prompt.pieces[index], ""))
    notes = (f"positions of which the server gave no candidates: {bare} of {len(shown)}",) if bare else ()
    return replace(reply, placed=tuple(placed), notes=notes)


def _piece(prompt: Prompt, index: int) -> str:
    return prompt.pieces[index] if index < len(prompt.ids) else ""


def _is_token(item: Prediction, index: int, hidden: int, prompt: Prompt, vocabulary: Vocabulary) -> bool:
    """Whether what the server shows is the prompt's token at `index`; the first one that it shows may lack a space."""
    if index >= len(prompt.ids):
        return False
    spaced = index == hidden and item.token.text.strip() == _piece(prompt, index).strip()
    return spaced or vocabulary.same(item.token, prompt.ids[index])


def _hidden(prompt: Prompt) -> int:
    """How many leading tokens have no text: a BOS."""
    text = prompt.text if prompt.text is not None else ""
    first = prompt.pieces[0] if prompt.pieces else ""
    return int(bool(text) and len(prompt.ids) > 1 and not text.lstrip().startswith(first.strip() or "\0"))


class _Question(Struct, frozen=True):
    """What the server is given to predict what follows `position`: a text, or ids."""

    position: int
    given: str | Sequence[int]


def _questions(prompt: Prompt, prefix_ids: Callable[[str], Sequence[int]], first: int) -> tuple[list[_Question], int]:
    """One question for each position from `first` on but the last, and how many positions no text leads to."""
    positions = range(first, len(prompt.ids) - 1)
    if prompt.text is None:
        return [_Question(position, prompt.ids[: position + 1]) for position in positions], 0
    questions: list[_Question] = []
    left = 0
    hidden = _hidden(prompt)
    for position in positions:
        prefix = "".join(prompt.pieces[hidden : position + 1])
        prefix = prefix if prompt.text.startswith(" ") else prefix.lstrip(" ")
        if prefix.strip() and prompt.text.startswith(prefix) and tuple(prefix_ids(prefix)) == prompt.ids[: position + 1]:
            questions.append(_Question(position, prefix))
        elif position >= hidden:
            left += 1
    return questions, left


def _one_by_one(
    reply: ServerReply,
    dialect: Dialect,
    prompt: Prompt,
    prefix_ids: Callable[[str], Sequence[int]],
    progress: Progress | None,
    first: int,
) -> ServerReply:
    """The answer with one request for each position but the last, which the first request covered already."""
    questions, left = _questions(prompt, prefix_ids, first)
    notes = []
    if left:
        notes.append(
            "positions left out, because the text up to there tokenizes differently on its own and the server does not echo: "
            f"{left} of {len(prompt.ids)}"
        )
    if len(questions) > _AT_ONCE:
        notes.append(
            f"the server was asked about {_AT_ONCE} of {len(questions)} positions, one request each, spread over the text"
        )
        questions = [questions[number * len(questions) // _AT_ONCE] for number in range(_AT_ONCE)]
    placed = []
    for number, question in enumerate(questions):
        if progress is not None:
            progress("server", number, len(questions))
        answer = dialect.complete(question.given, 1)
        if answer.generated and answer.generated[0].candidates:
            candidates = answer.generated[0].candidates
            own = next((item for item in candidates if item.id == prompt.ids[question.position + 1]), None)
            prefix = question.given if isinstance(question.given, str) else None
            placed.append(PlacedPrediction(question.position, candidates, own, prefix=prefix))
    if len(placed) < len(questions):
        notes.append(f"positions of which the server gave no candidates: {len(questions) - len(placed)} of {len(questions)}")
    return replace(reply, placed=tuple(placed), notes=tuple(notes))


def _chosen(reply: ServerReply, generated: Sequence[Prediction], vocabulary: Vocabulary, generate: int) -> ServerReply:
    """The answer with predictions after the prompt, along the tokens that the server chose, up to one whose id is not known."""
    tokens, placed, notes = list(reply.tokens), list(reply.placed), list(reply.notes)
    for number, item in enumerate(generated):
        possible = vocabulary.ids(item.token)
        known = {candidate.text: candidate.id for candidate in item.candidates if candidate.id is not None}
        chosen = possible[0] if len(possible) == 1 else known.get(item.token.text)
        if chosen is None and possible:
            chosen = possible[0]
        if item.candidates:
            placed.append(PlacedPrediction(len(tokens) - 1, item.candidates, item.token, chosen if generate else None))
        if chosen is None:
            if generate:
                notes.append(
                    f"the server's token {number} ({item.token.text[:20]!r}) has no id and no known text; the comparison ends there"
                )
            break
        if number < generate:
            tokens.append(chosen)
    return replace(reply, tokens=tuple(tokens), placed=tuple(placed), notes=tuple(notes))
