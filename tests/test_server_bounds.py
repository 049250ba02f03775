"""How far a right server may be off: just below each bound nothing is said, just above it the reason is named."""

import http.server
import threading
from math import log

import numpy as np
import pytest

from parity.server.ask import PlacedPrediction
from parity.server.base import KlFloor
from parity.server.choices import unfaithful
from parity.server.http import Connection, ServerError
from parity.server.limits import limit_of
from parity.server.numbers import meanings
from parity.server.predictions import TokenCandidate


@pytest.mark.parametrize(("worst", "limit"), [(1e-3, 2.5e-2), (1e-9, 1e-5)])
def test_a_limit_is_25_times_the_floor(worst: float, limit: float) -> None:
    """KL of llama.cpp against itself, times 25, and never below what the digits of a server's numbers leave."""
    assert limit_of(KlFloor(worst, worst)) == pytest.approx(limit)


@pytest.mark.parametrize(("behind", "named"), [(5e-4, False), (2e-3, True)])
def test_candidates_a_thousandth_apart_are_a_tie(behind: float, named: bool) -> None:
    """Of two candidates that are closer than 0.001 a greedy server may choose either."""
    first, second = TokenCandidate(" a", -1.0, 5), TokenCandidate(" b", -1.0 - behind, 6)
    assert bool(unfaithful([PlacedPrediction(3, (first, second), own=second, chosen=6)])) is named


@pytest.mark.parametrize(("moved", "named"), [(0.9, True), (1.1, False)])
def test_logits_lie_within_one_of_llama_cpps(moved: float, named: bool) -> None:
    """Numbers that are llama.cpp's logits but for a constant below 1 are logits; beyond it they are something else."""
    logits = np.array([3.0, 1.0, -2.0])
    log_sum = log(float(np.exp(logits).sum()) + 1)
    names = [meaning.name for meaning in meanings([logits + moved], [logits - log_sum], [log_sum])]
    assert ("logits" in names) is named


def test_a_busy_server_is_asked_six_times() -> None:
    """Five attempts follow the first one; then its status is the error."""
    asked: list[str] = []

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            self.send_response(503)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing on stderr."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(ServerError, match="503"):
                Connection(f"http://127.0.0.1:{server.server_port}").post("/v1", {})
        finally:
            server.shutdown()
            thread.join()
    assert len(asked) == 6
