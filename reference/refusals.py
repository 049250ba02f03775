"""What cannot be dumped is refused before anything is computed or written."""

from collections.abc import Sequence

from checkpoints import points
from checkpoints.errors import InputError
from checkpoints.record import ModelInfo

from .jobs import EXACT, NATIVE, DumpJob
from .model import Model
from .passes import Plans
from .rows import Survey


def check(job: DumpJob, model: Model) -> None:
    """Refuse a job that cannot be computed, before anything is written.

    Raises:
        InputError: no tokens, ids outside the vocabulary, too many of them, unknown mode, type or positions.
    """
    if job.mode not in (EXACT, NATIVE):
        raise InputError(f"--mode {job.mode!r} is unknown.", "Use exact or native.", code="mode")
    if job.kv_type not in ("f32", "f16") or (job.kv_type != "f32" and job.mode == EXACT):
        raise InputError(
            f"--kv-type {job.kv_type} is not available in {job.mode} mode.", "Exact mode takes f32.", code="kv_type"
        )
    if job.generate < 0:
        raise InputError(f"cannot generate {job.generate} tokens.", "Use 0 or more.", code="generate")
    if job.slice_size is not None and job.slice_size < 1:
        raise InputError(f"--slice must be at least 1, not {job.slice_size}.", "Use 1 or more.", code="slice")
    check_tokens(model, job.tokens, job.first_position + job.generate + len(job.lead or ()))
    model.checked(job.lead or ())
    if isinstance(job.positions, str):
        if job.positions not in ("all", "last"):
            raise InputError(f"--positions {job.positions!r} is not valid.", "Use all, last, or a list.", code="positions")
        return
    first = job.first_position
    last = first + len(job.tokens) + job.generate + len(job.lead or ()) - 1
    if wrong := [position for position in job.positions if not first <= position <= last]:
        raise InputError(f"there is no position {wrong[0]}.", f"The run has positions {first}…{last}.", code="positions")
    if not job.positions:
        raise InputError("--positions selects no position.", "Use all, last, or a list.", code="positions")


def check_tokens(model: Model, tokens: Sequence[int], more: int = 0) -> None:
    """Refuse tokens that the model cannot take.

    Raises:
        InputError: no tokens, ids outside the vocabulary, or more tokens than the model was trained for.
    """
    if not tokens:
        raise InputError("the prompt is empty.", "Give --prompt or --tokens.", code="prompt")
    model.checked(tokens)
    total = len(tokens) + more
    if model.n_ctx_train and total > model.n_ctx_train:
        raise InputError(
            f"{total} positions are more than the {model.n_ctx_train} for which {model.path.name} was trained.",
            "Use a shorter prompt, or generate less.",
            code="context",
        )


def generates(prompt: Survey, job: DumpJob, info: ModelInfo) -> None:
    """Refuse to generate with a model that scores no tokens, or not the next ones.

    Raises:
        InputError: tokens are asked for.
    """
    if not (job.generate or job.lead):
        return
    advice = "Leave --generate out."
    if all(item.point != points.LOGITS for item in prompt.known):
        raise InputError(f"{info.architecture} computes embeddings and cannot generate tokens.", advice, code="generate")
    # The mask of a single token shows nothing; but a causal model keeps what came before in a cache or a state.
    alone = len(job.tokens) == 1 and not any(_kept(item.point) for item in prompt.known)
    if alone or not prompt.causal:
        raise InputError(
            f"in {info.architecture} every position sees all others, so it cannot generate tokens.", advice, code="generate"
        )


def check_ways(plans: Plans, job: DumpJob, info: ModelInfo) -> None:
    """Refuse ubatches, sequences or a saved state for a model that cannot be computed so, or whose values could not be told apart.

    Raises:
        InputError: an encoder, or several sequences of a model with recurrent states.
    """
    if job.plain:
        return
    if plans.encoder is not None or not plans.prompt.causal:
        raise InputError(f"{info.architecture} is an encoder: it computes its whole input at once.", code="encoder")
    if job.companions and any("state" in points.parse(name).kind or "conv" in points.parse(name).kind for name in plans.names):
        raise InputError(
            f"{info.architecture} has recurrent states: sequences of unequal length are not computed in one graph.",
            code="sequences",
        )
    if (job.companions or job.saved) and (job.portions or job.ubatch or job.generate or job.lead):
        raise InputError("sequences and saved states are for a prompt in one pass.", code="ways")
    if not 0 <= job.saved < len(job.tokens):
        raise InputError(f"a state cannot be saved after {job.saved} of {len(job.tokens)} tokens.", code="ways")


def _kept(point: str) -> bool:
    """Whether a point is read from a cache, or is a recurrent state."""
    kind = points.parse(point).kind
    return kind in ("k_read", "v_read") or "cache" in kind or "state" in kind
