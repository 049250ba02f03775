"""What `parity isolate` is asked, and the reference that it may need."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from msgspec import Struct

from checkpoints.mapping import Mapping
from reference.client import Reference

# Measured: llama.cpp's CPU backend, 24 layers, 28 tokens, caches of F32 and F16; the worst operation of F32, F16, BF16, Q8_0,
# Q4_0, Q4_1, Q5_0, Q5_1, Q2_K … Q6_K, IQ4_NL and IQ4_XS lies at 3e-13 at most.
LIMIT = 1e-10
LIMIT_SOURCE = "right operations were off by 1e-12 at most, in every type"


class IsolateRequest(Struct, frozen=True):
    """The request of `parity isolate`; with `dump` a foreign engine's whole values are judged, else llama.cpp's."""

    model: Path
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    mode: str = ""
    kv_type: str = "f32"
    generate: int = 0
    rows: tuple[int, ...] = ()
    dump: Path | None = None
    tensors: Path | None = None
    mapping: Mapping | None = None
    compute: str | None = None
    windows: bool = True
    graft: str | None = None
    threads: int | None = None
    verbose: bool = False


def started(request: IsolateRequest, running: Reference | None) -> AbstractContextManager[Reference]:
    """The running reference, which stays, or one that is started and ends."""
    return Reference(verbose=request.verbose, threads=request.threads) if running is None else nullcontext(running)
