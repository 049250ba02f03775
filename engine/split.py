"""One model over several devices: consecutive layers are on consecutive devices, each with its own weights and KV cache."""

from collections.abc import Sequence
from itertools import chain

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.graph import RecordedGraph
from checkpoints.points import parse

from . import graph
from .backend import Array, Backend
from .engine import Progress
from .graph import Step
from .kv_cache import KvCache
from .transformer import Transformer
from .weights.gguf_model import GgufModel
from .weights.source import Weights


class DeviceSteps(Struct, frozen=True):
    """The steps of one device. `needs` are the values that they read but do not make, `leaves` those that later stages need."""

    backend: Backend
    steps: tuple[Step, ...]
    weights: Weights
    needs: frozenset[str]
    leaves: frozenset[str]


class SplitTransformer(Transformer):
    """Runs a model whose layers are spread evenly over the given devices; the same interface and numbers as `Transformer`.

    One device computes at a time: this is for models that do not fit on one device, not for speed.

    Raises:
        ModelError: as `Transformer`; InputError: a device cannot hold even the largest weight of its layers.
    """

    def __init__(
        self,
        model: GgufModel,
        backends: Sequence[Backend],
        *,
        resident: bool = True,
        recorded: RecordedGraph | None = None,
    ) -> None:
        super().__init__(model, backends[0], resident=False, recorded=recorded)
        self._backends, self._resident = backends, resident
        self.stages = stages(model, self.steps, backends, resident=resident)
        numbers = ", ".join(str(backend.number) for backend in backends)
        self.backend = replace(
            backends[0], spread=True, device=f"{backends[0].device}, device{'s' * (len(backends) > 1)} {numbers}"
        )

    def expect(self, positions: int) -> None:
        """As `Transformer.expect`."""
        before = self.steps
        super().expect(positions)
        if self.steps is not before:
            self.stages = stages(self.model, self.steps, self._backends, resident=self._resident)

    def start(self, first_position: int = 0) -> Progress:
        """A new, empty sequence whose first token stands at `first_position`, with a cache on every device."""
        return Progress(first_position, tuple(KvCache(stage.backend.xp) for stage in self.stages))

    @property
    def cache_backends(self) -> tuple[Backend, ...]:
        """As `Transformer.cache_backends`: one per device."""
        return tuple(stage.backend for stage in self.stages)

    def _compute(self, values: dict[str, Array], sequence: Progress, tap: graph.Tap) -> Array:
        known = dict(values)
        for stage, cache in zip(self.stages, sequence.caches, strict=True):
            with stage.backend.current():
                given = {name: stage.backend.take(known[name]) for name in stage.needs}
                known |= graph.run(stage.steps, given, stage.weights, cache, tap, keep=stage.leaves)
        return known[self.steps[-1].makes]


def stages(model: GgufModel, steps: Sequence[Step], backends: Sequence[Backend], *, resident: bool) -> list[DeviceSteps]:
    """The steps, cut into one stretch per device; a model with fewer layers than devices uses as many devices as it has layers."""
    n_layers = model.hyperparameters.n_layers
    used = backends[: min(len(backends), n_layers)]
    runs: list[list[Step]] = [[] for _ in used]
    layer = 0
    for step in steps:
        # What belongs to no layer goes with the layer before it: the embedding comes first, norm and logits last.
        layer = known if (known := parse(step.makes).layer) is not None else layer
        runs[layer * len(used) // n_layers].append(step)
    reads = [{name for step in run for name in step.names} for run in runs]
    makes = [{step.makes for step in run} for run in runs]
    return [
        DeviceSteps(
            backend=backend,
            steps=tuple(run),
            weights=Weights(model, backend, resident=resident, names=_wholes(run)),
            needs=frozenset(reads[i] - makes[i]),
            leaves=frozenset(makes[i].intersection(chain.from_iterable(reads[i + 1 :]))),
        )
        for i, (backend, run) in enumerate(zip(used, runs, strict=True))
    ]


def _wholes(run: Sequence[Step]) -> set[str]:
    """The weights that the steps read whole (of an embedding only rows are read)."""
    return {weight for step in run for weight in step.weights if isinstance(weight, str)}
