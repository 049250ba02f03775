"""The result of a comparison with a server's log-probabilities: data; `reports` formats it."""

from math import inf

from msgspec import Struct

TEACHER_FORCED, GREEDY = "text", "greedy"


class Predicted(Struct, frozen=True):
    """One prediction. Natural logarithms.

    Attributes:
        position: of the last token before the prediction, from 0; `before` is that token's text.
        kind: whether it follows the text's own tokens or those that the server chose.
        kl: KL(llama.cpp ‖ server) over the server's candidates and one entry for all others.
        server, ref: the first candidates as (id, text, log-probability); a server's id is -1 if its text matches no token.
        next_id: the token that follows in the text, or that the server chose; -1 if unknown.
        server_next, ref_next: the log-probability of that token; None if the server does not list it.
        margin: the log-probability of llama.cpp's first choice minus that of the server's; 0 if they are the same.
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


class ServerCause(Struct, frozen=True):
    """What explains the server's numbers: llama.cpp gives the same ones if the request is read this way.

    `kl` is the worst over the `tried` positions under this explanation, `without` the worst over the same positions as requested.
    """

    name: str
    sentence: str
    advice: str
    kl: float | None = None
    without: float | None = None
    tried: int = 0


class ServerAnswer(Struct, frozen=True):
    """The whole answer; true if the server predicts and chooses as llama.cpp does.

    Attributes:
        url, api: where and how the server was asked; `echoed`: whether one request gave all positions of the text.
        requests: how many requests it took.
        limit: the KL above which a prediction is wrong; `floor`: the most that llama.cpp differs from itself on these tokens.
        tokens: llama.cpp's ids of the prompt (the first `prompt` of them), followed by those that the server chose.
        prefix: the tokens up to the first wrong prediction.
        wanted: how many tokens the server was asked to choose.
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
    wanted: int = 0
    next_command: str = ""
    folder: str = ""
    notes: tuple[str, ...] = ()

    def of_limit(self, prediction: Predicted) -> float:
        """A prediction's KL as a multiple of the limit, which --tolerance may have set to 0."""
        return prediction.kl / self.limit if self.limit else inf if prediction.kl else 0.0

    def __bool__(self) -> bool:
        return self.first is None and not self.causes and not self.unfaithful
