"""Which stage takes the values of a run: copies on the host, or summaries on the device."""

from collections.abc import Collection

from checkpoints.record import DEFAULT_SLICE
from checkpoints.recording import Positions
from checkpoints.tensors import TensorWriter

from ..backend import Backend
from .host import HostStage
from .tap import Capture, RowSink


def tap(
    sink: RowSink,
    points: Collection[str],
    backend: Backend,
    *,
    positions: Positions = "all",
    slice_size: int | None = DEFAULT_SLICE,
    tensors: TensorWriter | None = None,
) -> Capture:
    """The tap for a backend: a stage on the current device, or copies on the host.

    The host's stage takes values in host memory, whole tensors, and the values of a model on several devices, where each device
    would need a slab, kernels and a stream of copies of its own.
    """
    if backend.name == "numpy" or backend.spread or tensors is not None or slice_size is None:
        return Capture(HostStage(sink, points, backend, slice_size=slice_size, tensors=tensors), positions=positions)
    from .device import DeviceStage  # only where there is a device

    return Capture(DeviceStage(sink, points, backend, slice_size=slice_size), positions=positions)
