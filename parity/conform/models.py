"""The tiny models of a run: seeded random weights, made once in the run's folder, named by what they were made from."""

import hashlib
import json
from functools import cache
from pathlib import Path

from checkpoints.errors import InputError, ModelError, ReferenceFailed
from checkpoints.whole_file import put
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
_DENSE = {"llama": "tiny-llama", "qwen2": "tiny"}  # architectures that are made without a recipe, and the shape to start from
_WIDE = {"width": _SUPER_BLOCK, "ff": 2 * _SUPER_BLOCK}


@cache
def model_name(architecture: str, kind: str, program: str) -> str:
    """Identifies a model by what it is made from: its recipe, type and seed, and the code that makes it."""
    facts: list[object] = []
    for wide in (False, True):
        if architecture in _DENSE:
            facts.append(str(_dense_shape(architecture, wide=wide)))
        else:
            chosen = recipe(architecture)
            try:
                own = _shape(chosen, wide=wide)
            except InputError:
                continue
            facts.append({"values": chosen.values(own, {}), "without": chosen.without, "shape": str(own)})
    digest = hashlib.sha256(json.dumps([facts, SEED, program], default=str, sort_keys=True).encode()).hexdigest()
    return f"{architecture}-{kind}-{digest[:12]}"


class Models:
    """Makes the models of one folder. Raises (in `path`): ModelError, ReferenceFailed if llama.cpp has no such model."""

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
            except (InputError, ReferenceFailed):  # an architecture whose other sizes do not fit this width
                pass
        return self._of_type(architecture, kind, wide=False)

    def points(self, model: Path) -> str:
        """Every point of a model, with commas."""
        return self._described(model)[0]

    def rope(self, model: Path) -> str:
        """Which elements RoPE rotates with each other: "NORM", "NEOX", …; "" where it rotates none."""
        return self._described(model)[1]

    def _described(self, model: Path) -> tuple[str, str]:
        """Points and RoPE, from a file beside the model: llama.cpp builds its graph once to list them."""
        kept = model.with_suffix(".points")
        try:
            names, rope = kept.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError):
            described = self._reference.describe(model)
            names, rope = ",".join(name for name, _ in described.points), described.rope
            put(kept, f"{names}\n{rope}".encode())
        return names, rope

    def _of_type(self, architecture: str, kind: str, *, wide: bool) -> Path:
        out = self._named(architecture, kind, wide=wide)
        if out.exists():
            return out
        plain = self._plain(architecture, wide=wide)
        if kind != "F32":
            self._reference.quantize(plain, TYPES[kind], out)
        return out

    def _named(self, architecture: str, kind: str, *, wide: bool) -> Path:
        return self._folder / f"{model_name(architecture, kind, self._program)}{'-wide' if wide else ''}.gguf"

    def _plain(self, architecture: str, *, wide: bool) -> Path:
        """The model in F32, from which the other types are made."""
        out = self._named(architecture, "F32", wide=wide)
        if out.exists():
            return out
        if architecture in _DENSE:
            make(out, _dense_shape(architecture, wide=wide), kind="f32", seed=SEED, tokenizer=embedded.path())
            return out
        chosen = recipe(architecture)
        try:
            make_by_recipe(
                out,
                chosen,
                _shape(chosen, wide=wide),
                {},
                kind="F32",
                seed=SEED,
                tokenizer=embedded.path(),
                running=self._reference,
            )
        except ModelError as error:
            raise ModelError(error.message.replace(str(out), f"a tiny {architecture}"), error.advice) from error
        return out


def _dense_shape(architecture: str, *, wide: bool) -> Shape:
    return shape_like(_DENSE[architecture], architecture=architecture, **(_WIDE if wide else {}))


def _shape(chosen: Recipe, *, wide: bool) -> Shape:
    return (
        shape_of(chosen, **{name: size for name, size in _WIDE.items() if getattr(chosen.shape, name)})
        if wide
        else chosen.shape
    )
