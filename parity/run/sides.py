"""What can stand on our side of a run: our engine, or a foreign one that a command line starts."""

from pathlib import Path

from checkpoints.points import layer_outputs
from engine.opened import open_engine
from engine.weights.gguf_model import GgufModel
from reference.client import Reference

from .ours import OursJob, chosen_points, dump
from .request import Generated, Progress, Prompt, Request


class Own:
    """Our engine as our side."""

    def __init__(self, request: Request) -> None:
        self._request = request
        # One forward pass reads each weight once: keep none of them. Generation reads them again at every step.
        self._transformer = open_engine(
            GgufModel(request.model),
            request.backend,
            request.devices,
            resident=request.generate > 0,
            native=request.mode == "native" and not request.full,  # whole tensors are the exact engine's
        )

    @property
    def points(self) -> str:
        """The points by name: llama.cpp's graph has nodes besides that nobody asked for."""
        return ",".join(chosen_points(self._transformer, self._request.points, self._request.layers))

    def check(self, prompt: Prompt) -> None:
        """Raises InputError for tokens that the model cannot take."""
        self._transformer.check(prompt.ids, self._request.first_position)

    def dump(self, prompt: Prompt, out: Path, led: Generated | None, progress: Progress | None) -> None:
        """Compute the prompt, then what was chosen for it, and write `out`."""
        request = self._request
        job = OursJob(
            out=out,
            tokens=prompt.ids,
            pieces=prompt.pieces,
            prompt=prompt.text,
            mode=request.mode,
            points=request.points,
            layers=request.layers,
            positions=request.positions,
            slice_size=request.slice_size,
            full=request.full,
            generated=led.ids if led else (),
            generated_pieces=led.pieces if led else (),
            first_position=request.first_position,
            on_step=None if progress is None else lambda done, total: progress("ours", done, total),
        )
        dump(self._transformer, job)


class Foreign:
    """A foreign engine as our side: a command line that writes a dump."""

    def __init__(self, request: Request, reference: Reference) -> None:
        self._request = request
        self._reference = reference

    @property
    def points(self) -> str:
        """What was asked for; which of it a foreign engine records is its own matter."""
        request = self._request
        return ",".join(layer_outputs(request.layers)) if request.layers is not None else request.points

    def check(self, prompt: Prompt) -> None:
        """A foreign engine judges its tokens itself."""

    def dump(self, prompt: Prompt, out: Path, led: Generated | None, progress: Progress | None) -> None:
        """Start it; it is to write `out`. Raises InputError or DumpError where it does not."""
        from .foreign import run_command

        request = self._request
        model = self._reference.twin(request.model) if request.mode == "exact" else request.model
        tokens = (*prompt.ids, *(led.ids if led else ()))
        run_command(request.command or "", model=model, tokens=tokens, out=out)
