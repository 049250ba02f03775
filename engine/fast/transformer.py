"""The fast mode: native weight types on the device, prefill through cuBLAS, decode as one kernel. CuPy only.

The plain operations of `engine.ops` remain the definition, and tests compare this mode with them. A prefill's products round
activations (and quantised weights) to half precision, or to bfloat16 for BF16 files; decode rounds nothing but its float32 sums,
and activations to 24 bits of the largest of 32 neighbours where they meet quantised weights.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import InputError

from ..backend import Array, Backend
from ..blocks import Blocks
from ..capture.device import DeviceStage
from ..capture.tap import Capture, CapturedPass
from ..engine import Progress, check_tokens, points_of
from ..graph import Step, WeightSource
from ..models import steps_of
from ..weights.gguf_model import GgufModel
from ..weights.packing import BF16, F32
from ..weights.source import Weights
from .decode import DecodeStep
from .prefill import Prefill
from .upload import Upload
from .weights import FastWeights

_POSITIONS = 2048  # places of the cache by default


class FastTransformer:
    """Runs a model in the file's own types, one sequence at a time; an `Engine`. Its kernels implement `steps` with `weights`.

    Raises:
        ModelError: the model has an architecture, shape or bias that this mode does not support.
    """

    def __init__(self, model: GgufModel, backend: Backend, *, positions: int = _POSITIONS) -> None:
        self.model = model
        self.backend = backend
        self.hp = model.hyperparameters
        self.encoder: Sequence[Step] | None = None
        self.steps: Sequence[Step] = steps_of(self.hp.architecture, Blocks(self.hp, model.tensors))
        self.weights: WeightSource = Weights(model, backend, resident=False)
        xp = backend.xp
        self._xp = xp
        self.stream = xp.cuda.Stream(non_blocking=True)
        with self.stream, Upload(model.path, backend) as upload:  # kernels are loaded while weights are being copied
            self._weights = FastWeights(model, backend, upload)
            self.step = DecodeStep(self._weights, backend, self.stream, min(positions, self.hp.n_ctx_train))
        self.stream.synchronize()

    @property
    def compute(self) -> str:
        """What a prefill's products round activations to, for the dump's header."""
        if self._weights.types == 1 << F32:
            return "f32"
        return "bf16" if self._weights.types >> BF16 & 1 else "f16"

    @property
    def points(self) -> list[str]:
        """Every point that can be captured, in dataflow order."""
        return points_of(self.steps)

    def check(self, tokens: Sequence[int], before: int) -> None:
        """Raise InputError for tokens that this model cannot take after `before` positions."""
        check_tokens(self.hp, tokens, before)

    def expect(self, positions: int) -> None:
        """Do nothing: no model that this mode supports has frequencies that depend on the length."""

    def start(self, first_position: int = 0) -> Progress:
        """A new, empty sequence; it replaces the last one, since there is only one cache."""
        with self.stream:
            self.step.set_angles(first_position)
        return Progress(first_position)

    def forward(self, tokens: Sequence[int], sequence: Progress, tap: Capture | None = None) -> NDArray[np.float32]:
        """One pass over the next tokens: [T] -> logits of the last position [V], on the host.

        Raises:
            InputError: tokens that the model or the cache cannot take.
        """
        self.check(tokens, sequence.first + sequence.length)
        self._fits(sequence.length + len(tokens))
        with self.stream:
            if len(tokens) == 1:
                self.step.place_token(int(tokens[0]), sequence.length)
                self._decode(sequence, tap)
                logits = self.step.logits
            else:
                logits = self._prefill(tokens, sequence, tap)[-1]
            return np.asarray(self._xp.asnumpy(logits))

    def generate(self, count: int, sequence: Progress, tap: Capture | None = None) -> NDArray[np.int32]:
        """`count` greedy steps after a prefill, chosen on the device: the ids of the tokens that were chosen [count + 1].

        The first is the prefill's own choice. Nothing waits for the device until all steps are launched.
        """
        self._fits(sequence.length + count)
        start = sequence.length
        with self.stream:
            for _ in range(count):
                self._decode(sequence, tap)
        return self.step.chosen(start, start + count + 1)

    def generate_one(self, sequence: Progress, tap: Capture | None = None) -> None:
        """Launch one greedy step and come back at once."""
        self._fits(sequence.length + 1)
        with self.stream:
            self._decode(sequence, tap)

    def _fits(self, length: int) -> None:
        if length > self.step.positions:
            raise InputError(
                f"{length:,} positions are more than the fast mode's cache of {self.step.positions:,}.",
                "Use a shorter prompt, or --mode exact.",
                code="context",
            )

    def _decode(self, sequence: Progress, tap: Capture | None) -> None:
        """Launch one step; the token stands in the device's state.

        Raises:
            TypeError: the tap cannot record steps of the device; nothing has been launched then.
        """
        stage: DeviceStage | None = None
        if tap is not None:
            if not isinstance(tap.stage, DeviceStage):
                raise TypeError("the fast mode's steps are recorded by engine.capture.device.DeviceStage")
            here = np.array([sequence.first + sequence.length])
            tap.begin(CapturedPass(here, sequence.passes, decode=sequence.passes > 0, first=sequence.first))
            stage = tap.stage if tap.keeps_rows else None
        self.step.launch(stage)
        sequence.length += 1
        sequence.passes += 1

    def _prefill(self, tokens: Sequence[int], sequence: Progress, tap: Capture | None) -> Array:
        """Logits of all rows [T, V]; the products are the same whatever is captured."""
        past, t = sequence.length, len(tokens)
        positions = np.arange(t) + sequence.first + past
        if tap is not None:
            tap.begin(CapturedPass(positions, sequence.passes, decode=sequence.passes > 0, first=sequence.first))
        logits = self._passes.run(np.asarray(tokens, dtype=np.int32), past, tap)
        sequence.length, sequence.passes = past + t, sequence.passes + 1
        self.step.place_best(logits[-1], past + t)
        return logits

    @cached_property
    def _passes(self) -> Prefill:
        """The prefill's buffers and kernels, made for the first prefill only: cuBLAS is slow to load."""
        return Prefill(self._weights, self.step, self.backend)
