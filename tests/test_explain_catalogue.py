"""Every entry of the catalogue, planted into an engine, is named by `parity explain` from a dump's values alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_places import HALVES, PLACES
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, tokens_of
from slow import slow_but

from engine.faults import CATALOGUE
from engine.synth import Shape, synthesize
from parity.explain.explain import explain
from reference.client import Reference

# Groups of 7 query heads, as Qwen2.5-0.5B; a vocabulary that is no multiple of 64.
_QWEN2 = Shape("qwen2", 3, 112, 14, 2, 0, 128, 300)
_LLAMA = Shape("llama", 3, 64, 4, 4, 16, 96, 300, biases=False, eps=1e-5, rope_base=5e5, rope_factors=True, rope_scaling=4.0)
_BLOCKS = Shape("qwen2", 3, 64, 4, 2, 0, 128, 300)  # rows that are multiples of 32
_SUPERBLOCKS = Shape("qwen2", 2, 256, 4, 2, 0, 256, 320)  # rows that are multiples of 256
_BY_PASS = {
    "rope-position-per-pass",
    "rope-position-by-prompt",
    "rope-position-in-decode",
    "rope-after-cache",
    "cache-row-missing",
    "cache-stale",
    "v-layout",
    "capture-row",
}
_INSIDE_LAYERS = {"capture-before-rope"}  # what it changes is not among the default points
_MODELS: dict[str, tuple[Shape, str]] = {
    "qkv-order": (_LLAMA, "f16"),
    "rope-factors-ignored": (_LLAMA, "f16"),
    "rope-scaling": (_LLAMA, "f16"),
    "nibble-order": (_BLOCKS, "q4_0"),
    "scale-min-swapped": (_BLOCKS, "q4_1"),
    "min-ignored": (_BLOCKS, "q4_1"),
    "high-bits-dropped": (_BLOCKS, "q5_0"),
    "scale-of-neighbour": (_BLOCKS, "q8_0"),
    "block-offset": (_BLOCKS, "q8_0"),
    "quants-signedness": (_BLOCKS, "q8_0"),
    "q4k-scale-min": (_SUPERBLOCKS, "Q4_K_M"),
    "scale-rounded": (_SUPERBLOCKS, "Q6_K"),
    "q3k-scales": (_SUPERBLOCKS, "Q3_K_M"),
    "keys-permuted-by-query-heads": (_BLOCKS, "f16"),
}
# Those that only some architectures can have are shown in test_explain_architectures.
_ANYWHERE = [name for name in CATALOGUE if name not in PLACES and name not in HALVES]
_SLOW = (  # a second and more each
    *("cache-shifted", "norm-in-halves", "cache-of-other", "rope-position-per-pass", "rope-after-cache", "nibble-order"),
    *("cache-row-missing", "no-gate", "layer-norm", "attn-scale"),
)
_BY_LLAMA = {"Q3_K_M", "Q4_K_M", "Q6_K"}  # types that gguf-py cannot make

Models = Callable[[str], Faulty]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, reference: Reference) -> Models:
    """The engine of the model in which a fault can act."""
    folder = tmp_path_factory.mktemp("explain")
    engines: dict[Path, Faulty] = {}

    def of(name: str) -> Faulty:
        shape, kind = _MODELS.get(name, (_QWEN2, "f16"))
        path = folder / f"{shape.architecture}-{shape.width}-{kind}.gguf"
        if not path.exists() and kind in _BY_LLAMA:
            synthesize(folder / "f32.gguf", shape, weight_type="f32", seed=3)
            reference.quantize(folder / "f32.gguf", kind, path)
        elif not path.exists():
            synthesize(path, shape, weight_type=kind, seed=3)
        if path not in engines:
            engines[path] = Faulty(path)
        return engines[path]

    return of


@pytest.mark.parametrize("name", slow_but(_ANYWHERE, *(name for name in _ANYWHERE if name not in _SLOW)))
def test_each_fault_is_named(name: str, faulty: Models) -> None:
    """A dump of sixteen values per record, without sketch and statistics, is enough to name the fault or one that is its equal."""
    engine = faulty(name)
    tokens = tokens_of(engine.model, 12, seed=5)
    parameters: dict[str, Any] = CATALOGUE[name].variants({step.makes: step for step in engine.right})[0]
    points = "all" if name in _INSIDE_LAYERS else "default"
    dump = engine.dump(Planted(((name, parameters, None),)), tokens, points=points, generated=4 if name in _BY_PASS else 0)
    explanation = explain(dump, engine.model, replace(PATIENT, tokens=tokens))
    assert explanation.first is not None
    assert explanation.remaining is None
    assert len(explanation.causes) == 1
    cause = explanation.causes[0]
    assert cause.explained == 1
    assert name in {cause.named.fault, *(other.fault for other in cause.equivalent)}


@pytest.mark.parametrize("name", _ANYWHERE)
def test_each_entry_speaks_to_the_user(name: str, faulty: Models) -> None:
    """Each entry has its sentences, and each of its variants can be put into words."""
    fault = CATALOGUE[name]
    assert all((fault.symptom, fault.fix, fault.seen, fault.group, fault.what))
    variants = fault.variants({step.makes: step for step in faulty(name).right})
    assert all("{" not in fault.sentence(parameters).replace("{q,k,v}", "") for parameters in variants)
    assert variants
