"""Servers that are hostile, busy or not there: each is one line, and nothing of an earlier run is left."""

import contextlib
import http.server
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli import Cli, one_line, refused

from parity.server.http import Connection, ServerError


class _Hostile(http.server.BaseHTTPRequestHandler):
    """Answers as its path says."""

    seen: dict[str, int]

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        what = self.path.strip("/").split("/")[0]
        self.seen[what] = self.seen.get(what, 0) + 1
        with contextlib.suppress(OSError):
            getattr(self, f"_{what}")()

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _words(self) -> None:
        self._send(200, b"hello")

    def _page(self) -> None:
        self._send(200, b"<!DOCTYPE html><title>Welcome</title>")

    def _stream(self) -> None:
        self._send(200, b'data: {"choices": []}\n\ndata: [DONE]\n\n')

    def _error(self) -> None:
        self._send(200, b'{"error": {"message": "no room"}}')

    def _tomorrow(self) -> None:
        self._send(429, b"", Retry_After="3600")

    def _never(self) -> None:
        self._send(429, b"", Retry_After="9" * 5000)

    def _list(self) -> None:
        self._send(200, b"[1]")

    def _deep(self) -> None:
        self._send(200, b"[" * 200_000)

    def _redirect(self) -> None:
        self._send(307, b"", Location="http://127.0.0.1:1/")

    def _denied(self) -> None:
        self._send(401, json.dumps({"error": {"message": "no\x1b[31m key\n"}}).encode())

    def _gzip(self) -> None:
        self._send(200, b"x", Content_Encoding="gzip")

    def _huge(self) -> None:
        self._send(200, b"", Content_Length=str(5 << 30))
        self._forever(b"[" * (1 << 16), 0.0)

    def _drip(self) -> None:
        self._send(200, b"", Content_Length=str(1 << 20))
        self._forever(b" ", 0.05)

    def _busy(self) -> None:
        self._send(503, b"", Content_Length=str(5 << 30))
        self._forever(b"x" * (1 << 16), 0.0)

    def _cut(self) -> None:
        self._send(200, b"{", Content_Length="100")
        self.close_connection = True

    def _gone(self) -> None:
        self.close_connection = True

    def _other(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9\r\n")
        self.close_connection = True

    def _unended(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        self.close_connection = True

    def _later(self) -> None:
        if self.seen["later"] < 3:
            self._send(429, b"", Retry_After="0")
        else:
            self._send(200, b'{"fine": 1}')

    def _nan(self) -> None:
        logprobs = {"tokens": ["a"], "token_logprobs": [math.nan], "top_logprobs": [None]}
        self._send(200, json.dumps({"choices": [{"text": "a", "logprobs": logprobs}]}).encode())

    def _positive(self) -> None:
        logprobs = {"tokens": [" and"], "token_logprobs": [5.0], "top_logprobs": [{" and": 5.0}]}
        self._send(200, json.dumps({"choices": [{"text": " and", "logprobs": logprobs}]}).encode())

    def _strange(self) -> None:
        entry = {"token": "no such piece", "logprob": -0.5}
        logprobs = {"content": [entry | {"top_logprobs": [entry]}]}
        self._send(200, json.dumps({"choices": [{"text": "x", "logprobs": logprobs}]}).encode())

    def _sure(self) -> None:
        logprobs = {"tokens": [" and"], "token_logprobs": [-0.01], "top_logprobs": [{" and": -0.01}]}
        self._send(200, json.dumps({"choices": [{"text": " and", "logprobs": logprobs}]}).encode())

    def _forever(self, piece: bytes, pause: float) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(pause)


@pytest.fixture(scope="module")
def hostile() -> Iterator[str]:
    """The URL of a server whose first folder says what it does wrong."""
    handler = type("Handler", (_Hostile,), {"seen": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("words", "did not answer /x with JSON"),
        ("page", "answered /x with a web page"),
        ("stream", "streams its answer to /x"),
        ("error", "answered /x with an error: no room"),
        ("tomorrow", "answered 429 to /x: it asks to wait 3,600 seconds"),
        ("never", "answered 429 to /x|within"),
        ("list", "with a JSON object"),
        ("deep", "did not answer /x with JSON"),
        ("redirect", "redirects"),
        ("denied", r"answered 401 to /x: no.\[31m key. Set \$PARITY_API_KEY"),
        ("gzip", "in the encoding gzip"),
        ("huge", "more than 64 MiB"),
        ("drip", "did not answer within 0.5 seconds"),
        ("busy", "503|within"),
        ("cut", "broke off: 1 of 100 bytes came"),
        ("gone", "broke off: it closed the connection without an answer"),
        ("unended", "broke off: its answer has no end"),
        ("other", "broke off: it does not answer with HTTP"),
    ],
)
def test_a_hostile_server_is_one_line(hostile: str, what: str, words: str) -> None:
    """Endless, huge, wrong or cut-off answers end in one bounded line."""
    began = time.monotonic()
    timeout = 0.5 if what in ("never", "drip", "busy") else 60.0
    with pytest.raises(ServerError, match=words.replace("/x", f"/{what}")) as raised:
        Connection(hostile, timeout=timeout).post(f"/{what}", {})
    one_line(f"parity: {raised.value}")
    assert time.monotonic() - began < 100


def test_a_busy_server_is_asked_again(hostile: str) -> None:
    """429 with Retry-After is waited for, and the third attempt has the answer."""
    connection = Connection(hostile)
    assert connection.post("/later", {}) == {"fine": 1}
    assert connection.requests == 3


def test_a_rate_is_kept(hostile: str) -> None:
    """Ten requests per second: three take 0.2 s at the least."""
    connection = Connection(hostile, rate=10.0)
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(ServerError):
            connection.post("/list", {})
    assert time.monotonic() - began > 0.19


@pytest.mark.parametrize(
    "url",
    ["ftp://x", "http://", "127.0.0.1:80", "http://a:b@c", "http://x:99999", "http://[::1", "http://x?key=1", "http://x:0"],
)
def test_an_address_that_is_none_is_one_line(url: str, parity: Cli) -> None:
    """Other schemes, passwords, ports and queries are refused before anything is sent."""
    refused(parity("run", "--prompt", "hi", "--server", url), "--server")


def test_a_server_that_is_not_there_is_one_line(parity: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """No listener, and a TLS handshake with what is no TLS server; a key with a line break never reaches a header."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    refused(parity("run", "--prompt", "hi", "--server", url), "cannot be reached", "Connection refused")
    monkeypatch.setenv("PARITY_API_KEY", "secret\r\nX: y")
    ran = parity("run", "--prompt", "hi", "--server", url)
    refused(ran, "PARITY_API_KEY")
    assert "secret" not in ran.err


def test_tls_that_cannot_be_trusted_is_one_line(hostile: str) -> None:
    """A server without TLS behind https://: one line that says so."""
    with pytest.raises(ServerError, match="TLS"):
        Connection(hostile.replace("http:", "https:"), timeout=60).post("/x", {})


@pytest.mark.slow
def test_nothing_of_an_earlier_run_is_left(hostile: str, parity: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of an earlier run holds this run's dump and answer afterwards, none that belong to others; a search that ran out of
    time says so, and a limit of 0 has a table, too.
    """
    monkeypatch.setattr(
        "parity.server.text_causes._BUDGET", 0.0
    )  # a model on which the search takes more than a minute takes this test longer
    folder = Path("folder")
    folder.mkdir()
    for name in ("ours.jsonl", "ours-odd.jsonl", "ref.jsonl", "diff.json", "report.html", "server.json"):
        (folder / name).write_text("old")
    words = ("run", "--prompt", "Lily had a big red", "--server", f"{hostile}/sure", "--out", folder, "--dump-prefix")
    code, answer = parity.json(*words)
    assert (code, answer["verdict"], answer["causes"]) == (1, "divergence", [])
    assert "the search for a chat template ended after 0 seconds: 0 of" in answer["notes"][-1]
    assert {path.name for path in folder.iterdir()} == {"ref.jsonl", "server.json"}
    assert all(path.read_text() != "old" for path in folder.iterdir())
    ran = parity(*words[:-1], "--tolerance", "0")
    assert (ran.code, "∞" in ran.out) == (1, True), ran.err
    assert {path.name for path in folder.iterdir()} == {"server.json"}


@pytest.mark.slow
def test_a_hostile_answer_ends_the_run_in_one_line(hostile: str, parity: Cli) -> None:
    """Through the command: NaN for a log-probability exits 2, and nothing is said on stdout."""
    refused(parity("run", "--prompt", "hi", "--server", f"{hostile}/nan"), "a log-probability is nan")
    refused(parity("run", "--prompt", "hi", "--server", f"{hostile}/positive"), "above 0, as if it were a logit")
    refused(parity("run", "--prompt", "hi", "--server", f"{hostile}/strange"), "none of the server's candidates is a token")
    refused(parity("run", "--prompt", "hi", "--server", hostile, "--exec", "x {out}"), "--server cannot be combined with")
    refused(parity("run", "--prompt", "hi", "--server", hostile, "--first-position", "5"), "--first-position")
    for option in (["--dump-prefix"], ["--server-top", "9"], ["--server-api", "openai"], ["--server-timeout", "5"]):
        refused(parity("run", "--prompt", "hi", *option), "need a server")
    refused(parity("run", "--prompt", "hi", "--server", hostile, "--server-json", "[1]"), "JSON object")
    refused(parity("run", "--prompt", "hi", "--server", hostile, "--server-json", "[" * 100_000), "--server-json is not JSON")
    refused(parity("run", "--prompt", "hi", "--server", hostile, "--server-timeout", "nan"), "positive number of seconds")
    refused(parity("run", "--prompt", "hi", "--server", hostile, "--server-rate", "0"), "positive number of requests")
