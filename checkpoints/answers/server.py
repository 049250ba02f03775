"""What a comparison with a server's log-probabilities found: data; `reports` formats it."""

from dataclasses import dataclass

TEACHER_FORCED, GREEDY = "text", "greedy"


@dataclass(frozen=True)
class Predicted:
    """One prediction. Natural logarithms.

    Attributes:
        position: of the last token that leads to it, from 0; `before` is that token's text.
        kind: behind the text's own tokens, or behind those that the server chose.
        kl: KL(llama.cpp ‖ server) over the server's candidates and one entry for all others.
        server, ref: the first candidates as (id, text, log-probability); a server's id is -1 where its text names no token.
        next_id: the token that follows in the text, or that the server chose; -1 if not known.
        server_next, ref_next: the log-probability of that token; None where the server does not list it.
        margin: what llama.cpp's first choice has over the server's, in log-probability; 0 where it is the same.
    """

    position: int
    before: str
    kind: str
    kl: float
    server: tuple[tuple[int, str, float], ...]
    ref: tuple[tuple[int, str, float], ...]
    next_id: int
    server_next: float | None
    ref_next: float | None
    margin: float
    wrong: bool

    @property
    def same_choice(self) -> bool:
        """Whether both would choose the same token."""
        return self.server[:1] == () or self.server[0][0] == self.ref[0][0]


@dataclass(frozen=True)
class ServerCause:
    """What explains the server's numbers: they are llama.cpp's when the request is read this way.

    `kl` is the worst of the `tried` positions so explained, `without` the worst of the same positions as they were asked for.
    """

    name: str
    sentence: str
    advice: str
    kl: float | None = None
    without: float | None = None
    tried: int = 0


@dataclass(frozen=True)
class ServerAnswer:
    """The whole answer; true where the server predicts and chooses as llama.cpp does.

    Attributes:
        url, api: where and how it was asked; `echoed` whether one request gave all positions of the text.
        requests: how many requests it took.
        limit: KL over which a prediction is wrong; `floor` what llama.cpp differs from itself on these tokens, at the worst.
        tokens: llama.cpp's ids of the prompt (`prompt` of them) and then those that the server chose.
        prefix: the tokens up to the first wrong prediction.
        unfaithful: chosen tokens that are not the most probable of the server's own candidates, as (position, chosen, better).
    """

    url: str
    api: str
    model: str
    mode: str
    prompt: int
    tokens: tuple[int, ...]
    predictions: tuple[Predicted, ...]
    limit: float
    floor: float
    echoed: bool
    requests: int
    seconds: float
    first: Predicted | None = None
    first_choice: Predicted | None = None
    causes: tuple[ServerCause, ...] = ()
    unfaithful: tuple[tuple[int, str, str], ...] = ()
    prefix: tuple[int, ...] = ()
    next_command: str = ""
    folder: str = ""
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.first is None and not self.causes and not self.unfaithful
