"""How a completion is requested, and how its answer is read: OpenAI's /v1/completions and llama.cpp's own /completion."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from msgspec import Struct, field

from .http import Connection, ServerError
from .predictions import Prediction, legacy, listed

AUTO, OPENAI, LLAMA_CPP = "auto", "openai", "llama.cpp"
_ABSENT = (404, 405, 501)  # the server has no such path


class Completion(Struct, frozen=True):
    """A server's answer: its predictions for the prompt's own tokens (if it echoes them), and for those that it chose.

    `prompt_tokens` is the prompt's number of tokens according to the server, None if it gives none; `stopped` is why it chose no more,
    in its words.
    """

    generated: tuple[Prediction, ...]
    prompt: tuple[Prediction, ...] = ()
    prompt_tokens: int | None = None
    text: str = ""
    stopped: str = ""


class Dialect(Protocol):
    """One way to request a completion."""

    name: str
    top: int
    echoes: bool | None

    def complete(self, prompt: str | Sequence[int], count: int, *, echo: bool = False) -> Completion:
        """The prompt and `count` greedily chosen tokens.

        Raises:
            ServerError: the server refuses, or its answer has no log-probabilities.
        """


class OpenAI(Struct):
    """`/v1/completions`; `echoes` is whether the server predicts the prompt's own tokens, None until it is known."""

    connection: Connection
    top: int
    model: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    path: str = "/v1/completions"
    name: str = OPENAI
    echoes: bool | None = None

    def complete(self, prompt: str | Sequence[int], count: int, *, echo: bool = False) -> Completion:
        """See `Dialect.complete`."""
        body: dict[str, Any] = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": count}
        body |= {"temperature": 0, "logprobs": self.top, "seed": 0, "stream": False}
        body |= ({"model": self.model} if self.model else {}) | ({"echo": True} if echo else {}) | dict(self.extra)
        answer = self.connection.post(self.path, body)
        where = f"{self.connection.name}{self.path}"
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise ServerError(f"{where} answers without choices.", "Check --server and --server-api.")
        choice = choices[0]
        text = choice.get("text")
        predictions = self._predictions(choice.get("logprobs"), where)
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        # What comes before the chosen tokens is the prompt; a server that stops early says so by its own count, and so does
        # llama-cpp-python's, which chooses one more after half a character.
        chosen = usage.get("completion_tokens") if isinstance(usage, dict) else None
        own = min(chosen if isinstance(chosen, int) and chosen >= 0 else count, len(predictions))
        self.echoes = len(predictions) > own if echo else self.echoes
        split = max(len(predictions) - own, _covered(predictions, prompt)) if echo and self.echoes else 0
        return Completion(
            tuple(predictions[split : split + count]),
            tuple(predictions[:split]),
            counted if isinstance(counted, int) else None,
            text if isinstance(text, str) else "",
            str(choice.get("finish_reason") or ""),
        )

    def _predictions(self, logprobs: Any, where: str) -> list[Prediction]:
        if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
            return listed(logprobs["content"], where)
        if isinstance(logprobs, dict):
            return legacy(logprobs, where)
        raise ServerError(
            f"{where} gives no log-probabilities.",
            "Start it so that it does (llama-cpp-python: --logits_all true), or check --server-api; transformers serve has none, --with hf "
            "runs its model.",
        )


class LlamaCppServer(Struct):
    """llama.cpp's own `/completion`; it never echoes."""

    connection: Connection
    top: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    path: str = "/completion"
    name: str = LLAMA_CPP
    echoes: bool | None = False

    def complete(self, prompt: str | Sequence[int], count: int, *, echo: bool = False) -> Completion:
        """See `Dialect.complete`."""
        body: dict[str, Any] = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "n_predict": count}
        body |= {"temperature": 0, "n_probs": self.top, "seed": 0, "stream": False, "cache_prompt": False} | dict(self.extra)
        answer = self.connection.post(self.path, body)
        where = f"{self.connection.name}{self.path}"
        probabilities = answer.get("completion_probabilities", answer.get("probs"))
        if not isinstance(probabilities, list):
            raise ServerError(f"{where} gives no log-probabilities.", "Check --server-api.")
        counted = answer.get("tokens_evaluated")
        text = answer.get("content")
        return Completion(
            tuple(listed(probabilities, where)[:count]),
            prompt_tokens=counted if isinstance(counted, int) else None,
            text=text if isinstance(text, str) else "",
            stopped=str(answer.get("stop_type") or ""),
        )


def _covered(predictions: Sequence[Prediction], prompt: str | Sequence[int]) -> int:
    """How many of the first predictions make up the prompt's text: llama-cpp-python's list is one short if it adds no BOS."""
    texts = "".join(item.token.text for item in predictions)
    if not isinstance(prompt, str) or (start := texts.find(prompt)) < 0:
        return 0
    length = 0
    for number, item in enumerate(predictions):
        length += len(item.token.text)
        if length >= start + len(prompt):
            return number + 1
    return 0


def dialect_of(
    connection: Connection, api: str, top: int, model: str, extra: Mapping[str, Any], prompt: str | Sequence[int]
) -> Dialect:
    """The dialect of this server: the one that `api` or the URL's path names, else the first in which it answers `prompt`.

    Raises:
        ServerError: it answers in neither.
    """
    path = connection.path
    last = path.rsplit("/", 1)[-1]
    if api == AUTO:
        api = OPENAI if last in ("v1", "completions") else LLAMA_CPP if last == "completion" else AUTO
    if api == OPENAI:
        return OpenAI(connection, top, model, extra, path if last == "completions" else _under(path, "/v1/completions"))
    if api == LLAMA_CPP:
        return LlamaCppServer(connection, top, extra, path if last == "completion" else f"{path}/completion")
    openai = OpenAI(connection, top, model, extra, f"{path}/v1/completions")
    try:
        openai.complete(prompt, 1)
    except ServerError as error:
        if error.status not in _ABSENT:
            raise
        return LlamaCppServer(connection, top, extra, f"{path}/completion")
    return openai


def _under(path: str, wanted: str) -> str:
    return path + wanted.removeprefix("/v1") if path.endswith("/v1") else path + wanted
