"""How well a side predicts a text, and how far its predictions are from another's: data; `reports` formats it."""

from msgspec import Struct, field

from .server import ServerCause

PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0)


class Worst(Struct, frozen=True):
    """The position at which the two sides differ most.

    `position` counts from the start of its chunk; `before` is the text up to there, `token` the id that follows in the text.
    `ours`, `base`: the first choices as (id, logit), or with log-probabilities where a side is no more than a list.
    """

    chunk: int
    position: int
    kl: float
    before: str
    token: int
    text: str
    ours: tuple[tuple[int, float], ...]
    base: tuple[tuple[int, float], ...]


class Scored(Struct, frozen=True):
    """The figures of one run over a text. Natural logarithms throughout.

    Attributes:
        context: tokens in a chunk; 0 where the chunks are golden prompts, all of whose positions are scored.
        positions: how many predictions were scored: the second half of each chunk, as llama-perplexity scores them.
        bounded: at how many of them the side's list lacks the text's own token, whose probability is then the most that the list leaves
            to it: `perplexity` is a lower bound.
        perplexity, base_perplexity: exp of the mean negative log-likelihood of the text's own next token; None if that side is missing.
        perplexity_error: one standard deviation of `perplexity`, estimated from the spread over positions.
        kl_mean, kl_max: KL(base ‖ side) of the predictions; `kl_error` is one standard deviation of the mean.
        kl_percentiles: percentile -> KL.
        same_top: the share of positions with the same first choice; `top_k`: mean share of the base's first five tokens that are in ours.
        delta_p_mean, delta_p_rms: of the probability of the text's own token, side − base.
        exact: both sides' whole rows were available; otherwise KL is over the tokens that both sides list and one entry for all others, a
            lower bound; `unseen` and `unseen_mean` are the probability that the base gives to that entry, at most and on average.
        causes: what explains a server's predictions, where they are not llama.cpp's.
    """

    side: str
    base: str
    text: str
    model: str
    tokens: int
    context: int
    chunks: int
    positions: int
    perplexity: float
    perplexity_error: float
    base_perplexity: float | None = None
    kl_mean: float | None = None
    kl_error: float | None = None
    kl_max: float | None = None
    kl_percentiles: dict[float, float] = field(default_factory=dict)
    same_top: float | None = None
    top_k: float | None = None
    delta_p_mean: float | None = None
    delta_p_rms: float | None = None
    bounded: int = 0
    exact: bool = True
    unseen: float = 0.0
    unseen_mean: float = 0.0
    worst: Worst | None = None
    causes: tuple[ServerCause, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return True
