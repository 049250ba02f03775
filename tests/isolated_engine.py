"""An engine of another kind, as `isolate` sees it: it dumps whole values, of right steps or of steps that a test has spoiled."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from checkpoints.answers.isolate import Isolation
from engine.graph import Step
from engine.opened import open_plain
from engine.weights.gguf_model import GgufModel
from parity.isolate.isolate import IsolateRequest, isolate
from parity.run.ours import OursJob, dump
from reference.client import Reference

TOKENS = (1, 403, 407, 261, 378, 390)  # any ids of the models' vocabularies


class Foreign:
    """An engine whose steps can be spoiled, and the judgement of what it dumped."""

    def __init__(self, model: Path, folder: Path, reference: Reference | None = None) -> None:
        self.model = model
        recorded = None if reference is None else partial(reference.graph, model)
        self.engine = open_plain(GgufModel(model), "numpy", recorded=recorded)
        self.right = self.engine.steps
        self.out = folder / "foreign.jsonl"

    def judged(self, steps: Sequence[Step], *, full: bool = True, points: str = "all") -> Isolation:
        self.engine.steps = steps
        try:
            dump(self.engine, OursJob(self.out, TOKENS, points=points, full=full, slice_size=16 if full else 1 << 20))
        finally:
            self.engine.steps = self.right
        return isolate(IsolateRequest(self.model, dump=self.out))

    def record(self, points: str) -> None:
        """A dump of the right engine, whole values beside it."""
        dump(self.engine, OursJob(self.out, TOKENS, points=points, full=True, slice_size=16))

    def spoil(self, name: str) -> None:
        """Change one position of a recorded value, and nothing else."""
        tensors = load_file(self.out.with_suffix(".safetensors"))
        tensors[f"{name}/0"][2] *= np.float32(1.5)
        save_file(tensors, self.out.with_suffix(".safetensors"))
