"""The tiny models of a run: seeded random weights, made once in the run's folder, named by what they are made of."""

import hashlib
import json
from pathlib import Path

from checkpoints.errors import InputError, ModelError, ReferenceFailed
from engine.synth import Shape, shape_like
from engine.synth.recipe import Recipe, shape_of
from engine.synth.recipes import recipe
from reference.client import Reference

from ..models import embedded
from ..synth.synthetic import make, make_by_recipe
from .matrix import TYPES

SEED = 0
# Super-blocks of the K and IQ types hold 256 elements: a narrower matrix would be stored in another type.
_SUPER_BLOCK = 256
_WIDE = {"width": _SUPER_BLOCK, "ff": 2 * _SUPER_BLOCK}


class Models:
    """Makes the models of one folder. Raises (in `path`): ModelError, ReferenceFailed where llama.cpp has no such model."""

    def __init__(self, folder: Path, reference: Reference, program: str) -> None:
        self._folder = folder
        self._reference = reference
        self._program = program  # identifies the code that makes models

    def path(self, architecture: str, kind: str) -> Path:
        """The file of that architecture and weight type."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if kind.startswith(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ")):
            try:
                return self._of_type(architecture, kind, wide=True)
            except (InputError, ReferenceFailed):  # an architecture whose other sizes do not go with this width
                pass
        return self._of_type(architecture, kind, wide=False)

    def _of_type(self, architecture: str, kind: str, *, wide: bool) -> Path:
        plain = self._plain(architecture, wide=wide)
        if TYPES[kind] == "F32":
            return plain
        out = plain.with_name(plain.name.replace("-F32-", f"-{kind}-"))
        if not out.exists():
            self._reference.quantize(plain, TYPES[kind], out)
        return out

    def _plain(self, architecture: str, *, wide: bool) -> Path:
        changes = _WIDE if wide else {}
        if architecture in ("llama", "qwen2"):
            shape = shape_like("tiny-llama" if architecture == "llama" else "tiny", architecture=architecture, **changes)
            out = self._named(architecture, {"shape": str(shape)})
            if not out.exists():
                make(out, shape, kind="f32", seed=SEED, tokenizer=embedded.path())
            return out
        chosen = recipe(architecture)
        own = _shape(chosen, wide=wide)
        out = self._named(architecture, {"values": chosen.values(own, {}), "without": chosen.without, "shape": str(own)})
        if not out.exists():
            try:
                make_by_recipe(out, chosen, own, {}, kind="F32", seed=SEED, tokenizer=embedded.path(), running=self._reference)
            except ModelError as error:
                raise ModelError(error.message.replace(str(out), f"a tiny {architecture}"), error.advice) from error
        return out

    def _named(self, architecture: str, facts: object) -> Path:
        digest = hashlib.sha256(json.dumps([facts, SEED, self._program], default=str, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{architecture}-F32-{digest[:12]}.gguf"


def _shape(chosen: Recipe, *, wide: bool) -> Shape:
    return (
        shape_of(chosen, **{name: size for name, size in _WIDE.items() if getattr(chosen.shape, name)})
        if wide
        else chosen.shape
    )
