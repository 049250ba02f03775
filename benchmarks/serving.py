"""What capture costs a server's client. One command, a table last:

    python benchmarks/serving.py [--backend numpy|cupy|fast] [--model FILE]

A single-threaded HTTP server whose handler answers a request with 32 greedy tokens, once with the default checkpoints
recorded to a file and once without, in turns. The first row is the client's time until it has the answer; the second, until
the file is whole, which is soon after that and before the handler returns. "fast" is the device's native mode.
"""

import argparse
import json
import platform
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from checkpoints.jsonl import Writer
from engine.backend import choose
from engine.capture.stages import tap
from engine.capture.tap import Capture
from engine.engine import Engine
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.models.embedded import path as default_model
from parity.run.ours import chosen_points

PROMPT = (2047, 9, 8, 7, 300, 12, 13, 14)
TOKENS = 32
REPEATS = 15  # pairs
GOAL_MS = 20


def engine_of(backend: str, model: Path) -> Engine:
    """The engine that serves."""
    if backend == "fast":
        from engine.fast.transformer import FastTransformer

        return FastTransformer(GgufModel(model), choose("cupy"), positions=128)
    return Transformer(GgufModel(model), choose(backend))


def generate(engine: Engine, capture: Capture | None) -> list[int]:
    """32 greedy tokens after the prompt."""
    taken: list[int] = []
    sequence = engine.start()
    logits = engine.forward(PROMPT, sequence, capture)
    for _ in range(TOKENS):
        taken.append(int(logits.argmax()))
        logits = engine.forward(taken[-1:], sequence, capture)
    return taken


@contextmanager
def recording(engine: Engine, points: list[str], path: Path) -> Iterator[Capture]:
    """The checkpoints of one request, in a file of its own."""
    with Writer(path) as writer, tap(writer, points, engine.backend) as capture:
        yield capture


@contextmanager
def server(engine: Engine, folder: Path) -> Iterator[str]:
    """The server on a free port; /on records, /off does not, /free is answered at once when no request is at work."""
    points = chosen_points(engine, "default", None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with recording(engine, points, folder / "ours.jsonl") if self.path == "/on" else nullcontext() as capture:
                body = json.dumps([] if self.path == "/free" else generate(engine, capture)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                # The client has its answer; leaving the block waits for the last records.

        def log_message(self, *_: Any) -> None:
            pass

    served = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{served.server_port}"
    finally:
        served.shutdown()
        served.server_close()
        thread.join()


def answer(url: str) -> tuple[float, list[int]]:
    """Milliseconds until the whole answer is there, and its tokens."""
    began = time.perf_counter()
    with urllib.request.urlopen(url) as reply:
        tokens = json.load(reply)
    return 1000 * (time.perf_counter() - began), tokens


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("numpy", "cupy", "fast"), default="numpy")
    parser.add_argument("--model", type=Path, default=None)
    options = parser.parse_args()
    model = options.model or default_model()
    engine = engine_of(options.backend, model)
    durations: dict[str, list[float]] = {"on": [], "off": []}
    whole: list[float] = []
    with tempfile.TemporaryDirectory() as folder, server(engine, Path(folder)) as url:
        tokens = {side: answer(f"{url}/{side}")[1] for side in durations}  # the first pass dequantises and compiles
        assert tokens["on"] == tokens["off"], "recording changed the answer"
        for _ in range(REPEATS):
            for side, times in durations.items():
                times.append(answer(f"{url}/{side}")[0])
                after = answer(f"{url}/free")[0]  # the next request must not wait for the records of this one
                if side == "on":
                    whole.append(after)
    added = statistics.median(on - off for on, off in zip(durations["on"], durations["off"], strict=True))
    off = statistics.median(durations["off"])
    print(f"{time.strftime('%Y-%m-%d')} · {engine.backend.device} · Python {platform.python_version()} · {model.stem}")
    print("\n| what | measured | to reach |\n|---|---|---|")
    print(f"| a request of {TOKENS} tokens, {options.backend}, without checkpoints | {off:.0f} ms | |")
    print(f"| added by the default checkpoints, median of {REPEATS} pairs | {added:.1f} ms | ≤ {GOAL_MS} ms |")
    print(f"| from the answer until its file is whole, median | {statistics.median(whole):.1f} ms | |")


if __name__ == "__main__":
    main()
