"""A Python engine that decodes by replaying a CUDA graph, to test what the emitted recorder writes.

python graph_engine.py FRAMEWORK MODE PASSES LAYERS WIDTH FF VOCAB OUT, with parity_dump.py beside the working folder. FRAMEWORK is
torch or cupy. MODE: "graph" replays one captured graph, "eager" makes the same passes without a graph, "bare" replays without
checkpoints; "tight" replays with the smallest ring there is; "ahead" does, too, and captures a second graph, for the other half of the
passes, while replays of the first wait (CuPy only); "unplaced" and "elsewhere" capture wrongly. "devices" replays a graph on each of two
devices in turns, of the layers that it has, and "devices eager" makes the same passes without graphs (CuPy only). Prints milliseconds
a pass.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
FIRST = 7  # position of the first pass


def steps_of_torch(layers: int, width: int, ff: int, vocab: int) -> tuple[Callable[[Any], None], Any]:
    """A pass that shows a tap what it computes, and the device array of its position."""
    import torch

    torch.manual_seed(0)
    make = lambda *shape: (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).half()  # noqa: E731
    up, down, out = [make(ff, width) for _ in range(layers)], [make(width, ff) for _ in range(layers)], make(vocab, width)
    position = torch.full((1,), FIRST, device="cuda")
    phase = torch.arange(width, device="cuda") * 0.11
    x = torch.zeros(1, width, device="cuda")

    def one_pass(tap: Any) -> None:
        x.copy_(torch.sin(position * 0.37 + phase)[None])
        tap("embd", x)
        for i in range(layers):
            x.mul_(0.5).add_(torch.sin(torch.relu(x.half() @ up[i].T) @ down[i].T).float())  # one buffer for every layer
            if i in (0, 5, 10, layers - 1):
                tap(f"blk.{i}.l_out", x)
        tap("output_norm", x)
        tap("logits", (x.half() @ out.T))
        position.add_(1)

    return one_pass, position


def run_torch(mode: str, passes: int, tap: Any, shape: tuple[int, ...]) -> float:
    """Milliseconds a pass."""
    import torch

    one_pass, position = steps_of_torch(*shape)
    one_pass(lambda *_: None)  # cuBLAS makes its handle
    position.fill_(FIRST)
    if hasattr(tap, "positions_from"):
        tap.positions_from(position)
    graph = torch.cuda.CUDAGraph()
    if mode != "eager":
        with torch.cuda.graph(graph):
            one_pass(tap)
        position.fill_(FIRST)
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    for _ in range(passes):
        one_pass(tap) if mode == "eager" else graph.replay()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / max(1, passes)


def run_cupy(mode: str, passes: int, tap: Any, shape: tuple[int, ...]) -> float:
    """Milliseconds a pass; elementwise kernels only, since cuBLAS cannot be captured by CuPy."""
    import cupy

    layers, width, _, vocab = shape
    position, x, logits = (
        cupy.full(1, FIRST, cupy.int64),
        cupy.zeros((1, width), cupy.float32),
        cupy.zeros((1, vocab), cupy.float16),
    )
    embed = cupy.ElementwiseKernel("raw int64 position", "float32 x", "x = sinf(position[0] * 0.37f + i * 0.11f)", "embed")
    layer = cupy.ElementwiseKernel("int32 l", "float32 x", "x = 0.5f * x + sinf(x * (l + 2))", "layer")
    last = cupy.ElementwiseKernel("raw float32 x, int32 n", "float16 y", "y = x[i % n] * (i % 7 - 3)", "last")
    advance = cupy.ElementwiseKernel("", "int64 position", "position += 1", "advance")

    def one_pass(tap: Any) -> None:
        embed(position, x)
        if mode == "elsewhere":
            with other:
                tap("embd", x)
        tap("embd", x)
        for i in range(layers):
            layer(cupy.int32(i), x)
            if i in (0, 5, 10, layers - 1):
                tap(f"blk.{i}.l_out", x)
        tap("output_norm", x)
        last(x, cupy.int32(width), logits)
        tap("logits", logits)
        advance(position)

    stream, other = cupy.cuda.Stream(), cupy.cuda.Stream()
    if hasattr(tap, "positions_from") and mode != "unplaced":
        tap.positions_from(position)
    cupy.cuda.Device().synchronize()
    with stream:
        one_pass(lambda *_: None)  # kernels are compiled
        position.fill(FIRST)
        stream.synchronize()
        graphs = []

        def capture() -> None:
            stream.begin_capture()
            try:
                one_pass(tap)
            finally:
                graphs.append(stream.end_capture())

        if mode != "eager":
            capture()
        begun, ended = cupy.cuda.Event(), cupy.cuda.Event()
        begun.record(stream)
        for i in range(passes):
            if mode == "ahead" and i == passes // 2:
                capture()
            one_pass(tap) if mode == "eager" else graphs[-1].launch(stream)
        ended.record(stream)
        ended.synchronize()
    return float(cupy.cuda.get_elapsed_time(begun, ended)) / max(1, passes)


def run_devices(mode: str, passes: int, tap: Any, shape: tuple[int, ...]) -> float:
    """Half of the layers on each of two devices, which do not wait for each other; the caller's device is the first."""
    import cupy

    layers, width = shape[0] // 2, shape[1]
    layer = cupy.ElementwiseKernel(
        "raw int64 position, int32 l", "float32 x", "x = sinf(position[0] * 0.37f + i * 0.11f + l)", "layer"
    )
    advance = cupy.ElementwiseKernel("", "int64 position", "position += 1", "advance")
    replays = []
    for number in (0, 1):
        with cupy.cuda.Device(number):
            position, x = cupy.full(1, FIRST, cupy.int64), cupy.zeros((1, width), cupy.float32)
            stream = cupy.cuda.Stream(non_blocking=True)
            cupy.cuda.Device().synchronize()

            def one_pass(
                tap: Any,
                number: int = number,
                position: Any = position,
                x: Any = x,
                stream: Any = stream,
                place: "list[int] | None" = None,
            ) -> None:
                with cupy.cuda.Device(number), stream:
                    for i in range(number * layers, (number + 1) * layers):
                        layer(position, cupy.int32(i), x)
                        tap(f"blk.{i}.l_out", x, place)
                    advance(position)

            if mode == "devices":
                with stream:
                    one_pass(lambda *_: None)  # kernels are compiled
                    position.fill(FIRST)
                    stream.synchronize()
                    tap.positions_from(position)
                    stream.begin_capture()
                    one_pass(tap)
                    graph = stream.end_capture()
                replays.append((number, graph, stream))
            else:
                for i in range(passes):
                    one_pass(tap, place=[FIRST + i])
    for i in range(passes if replays else 0):
        for number, graph, stream in replays:
            with cupy.cuda.Device(number):
                graph.launch(stream)
        if i == passes // 2:
            tap.flush()
    if mode == "devices":
        tap.flush()
        if cupy.cuda.runtime.getDevice() != 0:
            raise RuntimeError("the caller's device is another one after flush")
    return 0.0


def main() -> int:
    """Run, and record unless the mode is "bare"."""
    framework, mode, passes, *shape, out = sys.argv[1:]
    run = run_devices if mode.startswith("devices") else {"torch": run_torch, "cupy": run_cupy}[framework]
    sizes = tuple(int(size) for size in shape)
    if mode == "bare":
        with nullcontext(lambda *_: None) as nothing:
            print(run(mode, int(passes), nothing, sizes))
        return 0
    import parity_dump
    from parity_dump import Recorder

    if mode in ("tight", "ahead"):
        parity_dump._RING = 1

    try:
        with Recorder(out, compute="f16", layers=sizes[0]) as tap:
            # Positions of passes without a graph number themselves from 0; both sides say the same.
            place = tap if mode != "eager" else _Numbered(tap)
            print(run(mode, int(passes), place, sizes))
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 3
    return 0


class _Numbered:
    """Gives each pass of an engine without a graph its position."""

    def __init__(self, tap: Any) -> None:
        self._tap, self._position = tap, FIRST - 1

    def __call__(self, name: str, value: Any) -> None:
        self._position += name == "embd"
        self._tap(name, value, [self._position])


if __name__ == "__main__":
    sys.exit(main())
