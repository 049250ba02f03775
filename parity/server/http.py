"""JSON over HTTP from an untrusted server: every answer is bounded in time and size, every failure is one line."""

import http.client
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

import urllib3
from msgspec import Struct, field
from urllib3.exceptions import HTTPError, IncompleteRead, MaxRetryError, NewConnectionError, ProtocolError, SSLError
from urllib3.response import BaseHTTPResponse
from urllib3.util.retry import Retry

from checkpoints.errors import InputError
from checkpoints.nesting import parsed
from checkpoints.printable import printable
from reports.numbers import count

KEY_VARIABLE = "PARITY_API_KEY"
DEFAULT_TIMEOUT = 120.0  # seconds per request: a long prompt on a CPU may take one, but should not block CI for a night
LARGEST = 64 << 20  # bytes of an answer; 20 candidates for each of 32,768 positions are 40 MB
_PIECE = 1 << 16
_BUSY = (429, 502, 503, 504)  # temporary failures: too many requests, a proxy without its server, a model that is still loading
_RETRIES = 5
_BACK_OFF = 0.25  # seconds before the second attempt; twice as long before each further one
_LONGEST_PAUSE = 10.0  # most seconds between two attempts, whatever Retry-After says
_YEAR = 366 * 86400  # seconds; a Retry-After beyond it is no time that anybody waits
_SHOWN = 200  # characters of a server's own message that are shown


class ServerError(InputError):
    """The server cannot be used as requested (exit 2); `status` is its HTTP status, 0 if there was none; `late`: it took too long."""

    def __init__(self, message: str, advice: str = "", *, status: int = 0, late: bool = False) -> None:
        super().__init__(message, advice, code="server")
        self.status = status
        self.late = late


class _Passing(Exception):
    """A failure that may not occur at the next attempt; `pause` is how long the server asks to wait, None if it does not."""

    def __init__(self, error: ServerError, attempts: int, pause: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.attempts = attempts
        self.pause = pause


class Connection(Struct):
    """One server. `rate` is the largest number of requests per second, None for as many as it answers; `timeout` is in seconds
    and counts for a whole request with its retries.

    Raises:
        InputError: the URL is not http(s), or a number is out of range.
    """

    url: str
    key: str = ""
    timeout: float = DEFAULT_TIMEOUT
    rate: float | None = None
    retries: int = _RETRIES
    requests: int = 0
    _last: float = -math.inf
    # No redirects, since the key is for this server only; and none of urllib3's retries, which read the whole body of an error.
    _pool: urllib3.PoolManager = field(default_factory=lambda: urllib3.PoolManager(num_pools=1, retries=False))

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            raise ServerError(
                f"--server {printable(self.url)} is not a URL: {error}.", "Write e.g. http://127.0.0.1:8080."
            ) from None
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ServerError(f"--server {printable(self.url)} is not an http(s) URL.", "Write e.g. http://127.0.0.1:8080.")
        if parts.query or parts.fragment:
            raise ServerError("--server must not have a query or a fragment (? or #).", "Write e.g. http://127.0.0.1:8080/v1.")
        if parts.username or parts.password:
            raise ServerError("--server must not contain a user or a password.", f"Put the key into ${KEY_VARIABLE}.")
        if not math.isfinite(self.timeout) or self.timeout <= 0:
            raise InputError("--server-timeout must be a positive number of seconds.", code="server")
        if self.rate is not None and (not math.isfinite(self.rate) or self.rate <= 0):
            raise InputError("--server-rate must be a positive number of requests per second.", code="server")
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key:
            raise ServerError("the API key has characters that no HTTP header can hold.", f"Check ${KEY_VARIABLE}.")

    @property
    def path(self) -> str:
        """The URL's path without a closing slash."""
        return urlsplit(self.url).path.rstrip("/")

    @property
    def name(self) -> str:
        """Host and port, as messages name it."""
        return printable(urlsplit(self.url).netloc)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that the server returns for a JSON object.

        Raises:
            ServerError: no connection, a time-out, a TLS failure, another status than 200, or something other than a JSON object.
        """
        self._wait()
        status, data = self._in_time(lambda stop: self._attempts(path, body, stop))
        if status != 200:
            raise self._refused(status, data, path)
        return self._object(data, path)

    def _wait(self) -> None:
        if self.rate is not None:
            sleep(max(self._last + 1 / self.rate - monotonic(), 0.0))
            self._last = monotonic()

    def _in_time(self, work: "Callable[[threading.Event], tuple[int, bytes]]") -> tuple[int, bytes]:
        """The work's result, within `timeout`: a server that sends a byte now and then would never time out by itself."""
        results: list[tuple[int, bytes]] = []
        failures: list[BaseException] = []
        stop = threading.Event()

        def run() -> None:
            try:
                results.append(work(stop))
            except BaseException as error:  # raised again in the waiting thread
                failures.append(error)

        thread = threading.Thread(target=run, name="parity-request", daemon=True)
        thread.start()
        try:
            thread.join(self.timeout)
        finally:
            stop.set()
        if failures:
            raise failures[0]
        if not results:
            raise self._late()
        return results[0]

    def _attempts(self, path: str, body: Mapping[str, Any], stop: threading.Event) -> tuple[int, bytes]:
        """Status and body, after several attempts if the failures are temporary."""
        for attempt in itertools.count():
            self.requests += 1
            try:
                return self._exchange(path, body, stop)
            except _Passing as failure:
                if attempt >= min(failure.attempts, self.retries) or stop.is_set():
                    raise failure.error from failure
                wanted = _BACK_OFF * 2**attempt if failure.pause is None else failure.pause
                if wanted > self.timeout:
                    raise (failure.error if failure.pause is None else self._busy_for(failure, wanted)) from failure
            if stop.wait(min(max(wanted, 1 / self.rate if self.rate else 0.0), _LONGEST_PAUSE)):
                break
        raise self._late()

    def _exchange(self, path: str, body: Mapping[str, Any], stop: threading.Event) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            response = self._pool.request(
                "POST",
                f"{parts.scheme}://{parts.netloc}{path}",
                body=json.dumps(body).encode(),
                headers=headers,
                redirect=False,
                preload_content=False,
                decode_content=False,
                timeout=urllib3.Timeout(connect=min(self.timeout, 10.0), read=self.timeout),
            )
            try:
                data = self._read(response, stop)
            finally:
                response.close()
        except (HTTPError, OSError, ValueError) as error:
            raise self._unreachable(error) from error
        if response.status in _BUSY:
            raise _Passing(self._refused(response.status, data, path), _RETRIES, _retry_after(response))
        return response.status, data

    def _read(self, response: BaseHTTPResponse, stop: threading.Event) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise ServerError(
                f"{self.name} answers in the encoding {printable(encoding, 40)}, which was not requested.", "Turn it off."
            )
        parts: list[bytes] = []
        size = 0
        limit = LARGEST if response.status == 200 else _PIECE
        while not stop.is_set():
            piece = response.read(_PIECE)
            if not piece:
                break
            parts.append(piece)
            size += len(piece)
            if size > limit:
                if response.status != 200:
                    break
                raise ServerError(f"{self.name} answers with more than {LARGEST >> 20} MiB.", "Is this a completion server?")
        return b"".join(parts)

    def _busy_for(self, failure: "_Passing", seconds: float) -> ServerError:
        """The refusal of a server that asks to be left alone for longer than a request may take."""
        message = failure.error.message.rstrip(".")
        return ServerError(
            f"{message}: it asks to wait {count(round(seconds), 'second')}.", "Run again then.", status=failure.error.status
        )

    def _late(self) -> ServerError:
        return ServerError(
            f"{self.name} did not answer within {self.timeout:g} seconds.",
            "Give it more with --server-timeout, or send a shorter text.",
            late=True,
        )

    def _unreachable(self, error: BaseException) -> "ServerError | _Passing":
        if isinstance(error, MaxRetryError) and error.reason is not None:
            error = error.reason
        if isinstance(error, NewConnectionError):
            words = str(error.__cause__ or error).rsplit("] ", 1)[-1]
            reason = f"{self.name} cannot be reached: {printable(words, _SHOWN)}."
            return _Passing(ServerError(reason, "Is the server running? Check --server."), 2)
        if isinstance(error, urllib3.exceptions.TimeoutError):
            return self._late()
        if isinstance(error, SSLError):
            words = str(error.args[0] if error.args else error)
            return ServerError(
                f"{self.name} has no trusted TLS connection: {printable(words, _SHOWN)}.",
                "Name its certificate with SSL_CERT_FILE; for a server without TLS write http://.",
            )
        return _Passing(ServerError(f"{self.name} broke off: {_broken(error)}.", "Check the server's log."), 2)

    def _refused(self, status: int, data: bytes, path: str) -> ServerError:
        words = _words(data)
        if 300 <= status < 400:
            return ServerError(
                f"{self.name} redirects {path} to another URL ({status}).", "Give the final URL to --server.", status=status
            )
        advice = {
            401: f"Set ${KEY_VARIABLE} to its API key.",
            403: f"Set ${KEY_VARIABLE} to its API key.",
            404: "Check --server and --server-api.",
            429: "--server-rate limits the requests per second.",
        }.get(status, "Check the server's log.")
        if "logprobs" in words or "logits_all" in words:
            advice = "Enable log-probabilities; for llama-cpp-python's server, with --logits_all true."
        return ServerError(f"{self.name} answered {status} to {path}{f': {words}' if words else ''}.", advice, status=status)

    def _object(self, data: bytes, path: str) -> dict[str, Any]:
        try:
            answer = _json(data)
        except ValueError:
            start = data[:_SHOWN].lstrip().lower()
            if start.startswith((b"data:", b"event:")):
                raise ServerError(
                    f"{self.name} streams its answer to {path}, although one JSON object was asked for.",
                    'Turn streaming off; the request said "stream": false.',
                ) from None
            if start.startswith(b"<"):
                raise ServerError(
                    f"{self.name} answered {path} with a web page, not with JSON.",
                    "Check --server: a proxy or another program may answer there.",
                ) from None
            raise ServerError(f"{self.name} did not answer {path} with JSON.", "Check --server and --server-api.") from None
        if not isinstance(answer, dict):
            raise ServerError(f"{self.name} did not answer {path} with a JSON object.", "Check --server and --server-api.")
        if answer.get("error") and (words := _words(data)):  # with status 200
            raise ServerError(f"{self.name} answered {path} with an error: {words}.", "Check the server's log.")
        return answer


def _retry_after(response: BaseHTTPResponse) -> float | None:
    try:
        seconds = Retry().get_retry_after(response)
    except (HTTPError, ValueError, OverflowError):  # the header is not a time
        return None
    return seconds if seconds is not None and seconds <= _YEAR else None


def _broken(error: BaseException) -> str:
    """What went wrong with a connection; urllib3 wraps a sentence of its own and the cause in a ProtocolError."""
    if isinstance(error, ProtocolError) and error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    if isinstance(error, http.client.RemoteDisconnected):
        return "it closed the connection without an answer"
    if isinstance(error, http.client.BadStatusLine):  # also the base of the one above
        return "it does not answer with HTTP"
    if isinstance(error, IncompleteRead) and error.expected:
        return f"{error.partial:,} of {error.partial + error.expected:,} bytes came"
    if isinstance(error, http.client.IncompleteRead):  # of an answer in chunks, also the base of urllib3's
        return "its answer has no end"
    return printable(str(error), _SHOWN) or type(error).__name__


def _json(data: bytes) -> Any:
    """An answer's JSON, in UTF-8; raises ValueError if it is none."""
    return parsed(json.loads, data.decode("utf-8-sig"))


def _words(data: bytes) -> str:
    """The server's message on an error: OpenAI's `error.message`, FastAPI's `detail`, else the beginning of the text."""
    text: Any
    try:
        body = _json(data)
        error = body.get("error", body)
        text = error if isinstance(error, str) else error.get("message") or error.get("detail") or ""
    except (ValueError, AttributeError):
        text = data[: 4 * _SHOWN].decode("utf-8", "replace")
        if "<html" in text.lower():
            return ""
    return printable(" ".join(str(text).split()), _SHOWN).rstrip(".")


def key_from_environment() -> str:
    """The API key, $PARITY_API_KEY; "" if there is none."""
    return os.environ.get(KEY_VARIABLE, "")
