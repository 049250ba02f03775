"""Starts a real completion server on a free port of loopback, right or with a planted fault.

Run by an interpreter that has the server's package: `servers.py KIND MODEL PORT [FAULT]`. PORT is a number, or a file in which a free
one is written. KIND is `llama_cpp` (llama-cpp-python's
own server, FastAPI) or `xllamacpp` (llama.cpp's own server, the C++ one, as that package builds it).
"""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from processes import comes_true

Start = Callable[..., str]


def started(python: str, folder: Path) -> Iterator[Start]:
    """A function that starts a real server, once for each kind, model and fault, and gives its URL; then they are ended."""
    running: dict[tuple[str, ...], tuple[subprocess.Popen[bytes], int]] = {}

    def start(kind: str, model: Path, fault: str = "") -> str:
        key = (kind, str(model), fault)
        if key not in running:
            for attempt in range(3):  # between its choice and its use another program may take a port
                port_file = folder / f"{len(running)}-{attempt}-{kind}-{fault}"
                command = [python, __file__, kind, str(model), str(port_file), fault]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                running[key] = process, 0
                assert comes_true(partial(ended_or_ready, process, port_file), 300), "the server does not listen"
                if process.poll() is None:
                    running[key] = process, int(port_file.read_text())
                    break
            assert running[key][1], "the server ended"
        return f"http://127.0.0.1:{running[key][1]}"

    yield start
    for process, _ in running.values():
        process.kill()
        process.wait()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False


def ended_or_ready(process: "subprocess.Popen[bytes]", port_file: Path) -> bool:
    """Whether a server has ended, or has written its port and listens on it."""
    if process.poll() is not None:
        return True
    return port_file.exists() and bool(port := port_file.read_text()) and listens(int(port))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def changed(fault: str, prompt: str, given: dict[str, Any]) -> str:
    """The prompt as a faulty server reads it; a sampler's fault changes the settings instead."""
    if fault == "temperature":
        given |= {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7}
    if fault == "penalty":
        given |= {"repeat_penalty": 1.3}
    if fault == "template-hidden":
        given["echo"] = False
    if fault.startswith("template"):
        return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    return prompt


def biased(logits: Any, log_softmax: Any, bias: dict[int, float]) -> Any:
    """Log-probabilities of logits to which a number is added at some tokens."""
    changed = np.array(logits, dtype=np.float32)
    for token, by in bias.items():
        changed[..., token] += by
    return log_softmax(changed)


def of_largest(logits: Any, log_softmax: Any, count: int) -> Any:
    """Log-probabilities of which only the `count` largest logits of each row are left."""
    edge = np.sort(logits, axis=-1)[..., -count, None]
    return log_softmax(np.where(logits >= edge, logits, -1e30).astype(np.float32))


# What a server may give instead of log_softmax(logits).
NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "log10": lambda logits, log_softmax: log_softmax(logits) / np.log(10),
    "log2": lambda logits, log_softmax: log_softmax(logits) / np.log(2),
    "logits": lambda logits, _: logits,
    "unsettled": lambda logits, log_softmax: log_softmax(logits) - np.abs(logits[..., :1]),
    "sign": lambda logits, log_softmax: -log_softmax(logits),
    "probabilities": lambda logits, log_softmax: np.exp(log_softmax(logits)),
    "scaled": lambda logits, log_softmax: 0.7 * log_softmax(logits),
    "heated": lambda logits, log_softmax: log_softmax((logits / 0.7).astype(np.float32)),
    "top-k": lambda logits, log_softmax: of_largest(logits, log_softmax, 40),
    "bias": lambda logits, log_softmax: biased(logits, log_softmax, {258: 2.5, 13: -1.5}),
    "banned": lambda logits, log_softmax: biased(logits, log_softmax, {315: -100.0}),
    "top-3": lambda logits, log_softmax: of_largest(logits, log_softmax, 3),
}


def llama_cpp(model: str, port: int, fault: str) -> None:
    import llama_cpp
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    right = llama_cpp.Llama.create_completion
    if fault in NUMBERS:
        log_softmax = llama_cpp.Llama.logits_to_logprobs
        llama_cpp.Llama.logits_to_logprobs = staticmethod(lambda logits, axis=-1: NUMBERS[fault](logits, log_softmax))
    elif fault:

        def create_completion(self: Any, prompt: str, *arguments: Any, **given: Any) -> Any:
            return right(self, changed(fault, prompt, given), *arguments, **given)

        llama_cpp.Llama.create_completion = create_completion
        llama_cpp.Llama.__call__ = create_completion
    settings = ModelSettings(model=model, logits_all=fault != "no-logprobs", n_ctx=512, n_threads=1, verbose=False)
    app = create_app(server_settings=ServerSettings(), model_settings=[settings])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def xllamacpp(model: str, port: int, fault: str) -> None:
    import xllamacpp

    if fault:
        inner, outer = free_port(), port
        threading.Thread(target=between, args=(outer, inner, fault), daemon=True).start()
        port = inner
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 512
    params.n_parallel = 1
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.fit_params = False
    server = xllamacpp.Server(params)
    while server.listening_address:
        time.sleep(0.2)
        if os.getppid() == 1:
            return


def between(port: int, inner: int, fault: str) -> None:
    """A server on `port` that changes requests as a faulty one would read them, and passes them on to the one on `inner`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = json.loads(body) if body else {}
            if isinstance(request.get("prompt"), str):
                request["prompt"] = changed(fault, request["prompt"], request)
            passed = http.client.HTTPConnection("127.0.0.1", inner, timeout=60)
            text = json.dumps(request) if body else None
            passed.request(self.command, self.path, text, {"Content-Type": "application/json"} if body else {})
            answer = passed.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.getheader("Content-Type") or "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_arguments: Any) -> None:
            pass

    while not listens(inner):
        time.sleep(0.1)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    kind, model, port, *rest = sys.argv[1:]
    chosen = int(port) if port.isdecimal() else free_port()
    if not port.isdecimal():
        Path(port).write_text(str(chosen), encoding="utf-8")
    {"llama_cpp": llama_cpp, "xllamacpp": xllamacpp}[kind](model, chosen, rest[0] if rest else "")
