"""Faults of multi-head latent attention: norms of the latents, the place of the rotated part, the matrices of the heads."""

from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.graph import Size

from .. import ops
from ..backend import Array, module_of
from ..graph import Step, View, name_of
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, layer_of, read_of, sibling, weight_of
from .edits import Then, only, require
from .weights import altered, each_transposed

_LATENT_NORMS = ("attn_kv_a_norm", "attn_q_a_norm")
_ABSORBED = ("attn_k_b", "attn_v_b")


def _norm_missing(step: Step, _right: Steps, parameters: Parameters) -> Step:
    weight = weight_of(step, 0)
    if not isinstance(weight, str) or not any(f".{name}." in weight for name in parameters["norm"]):
        return step
    if step.op is not ops.rms_norm:
        raise NotApplicable(f"{step.makes} is not a plain norm")
    return only(step, read_of(step, 0))


class _OfWhole(Struct, frozen=True):
    """An operation on a part of a row that was normalised as a whole: `begin` and `end` of the part."""

    op: Callable[..., Array]
    begin: int
    end: int
    eps: float

    def __call__(self, whole: Array, *inputs: Any, **params: Any) -> Array:
        """[T, n], … -> [T, m]."""
        normed = ops.rms_norm(whole, module_of(whole).ones(whole.shape[1], dtype=whole.dtype), eps=self.eps)
        return self.op(module_of(whole).ascontiguousarray(normed[:, self.begin : self.end]), *inputs, **params)


def _times(part: Array, weight: Array, **_params: Any) -> Array:
    return part * weight


def _norm_of_whole(step: Step, right: Steps, _parameters: Parameters) -> Step:
    read, latent = read_of(step, 0), sibling(step, right, "kv_cmpr")
    if not isinstance(read, View) or step.op not in (ops.rms_norm, ops.rope) or latent.op is not ops.rms_norm:
        raise NotApplicable(f"{step.makes} reads no part of the latent's product")
    if not (read.offset.constant and read.shape[-1].constant):
        raise NotApplicable(f"{step.makes}: the part's place depends on the length")
    begin = read.offset.fixed
    op = _OfWhole(_times if step is latent else step.op, begin, begin + read.shape[-1].fixed, float(latent.params["eps"]))
    return replace(step, op=op, reads=(name_of(read), *step.reads[1:]))


def _parts(step: Step, right: Steps) -> list[View]:
    """The two parts of a value that the layer's steps read, in order; `step` reads one of them."""
    own = read_of(step, 0)
    if not isinstance(own, View):
        raise NotApplicable(f"{step.makes} reads a whole value")
    layer = f"blk.{layer_of(step)}."
    reads = [read for name, other in right.items() if name.startswith(layer) for read in other.reads]
    parts = {read.offset.fixed: read for read in reads if isinstance(read, View) and read.of == own.of}
    if len(parts) != 2 or 0 not in parts:
        raise NotApplicable(f"{step.makes}: the value is not read in two parts")
    return [parts[offset] for offset in sorted(parts)]


def _exchanged_parts(step: Step, right: Steps, _parameters: Parameters) -> Step:
    """Each part read from where it would lie if the two were exchanged."""
    leading, trailing = _parts(step, right)
    own = read_of(step, 0)
    assert isinstance(own, View)
    offset = Size(0) if own.offset == trailing.offset else Size(trailing.shape[-1].fixed)
    if not (leading.shape[-1].constant and trailing.shape[-1].constant):
        raise NotApplicable(f"{step.makes}: the parts' widths depend on the length")
    return replace(step, reads=(replace(own, offset=offset), *step.reads[1:]))


def _joined_the_other_way(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    first, second = require(step, "CONCAT").params["operands"]
    return replace(step, params={**step.params, "operands": (second, first)})


_READ: dict[str, Callable[[Array], Array]] = {
    "transposed": each_transposed,
    "of the next head": lambda weight: weight[[*range(1, weight.shape[0]), 0]],
    "of the first head": lambda weight: weight[[0] * weight.shape[0]],
}


def _absorbed(step: Step, _right: Steps, parameters: Parameters) -> Step:
    weight = weight_of(step, 0)
    if not isinstance(weight, str) or f".{parameters['weight']}." not in weight:
        return step
    change = _READ[parameters["read"]]

    def checked(matrix: Array) -> Array:
        if matrix.ndim != 3:
            raise NotApplicable(f"{weight} is not one matrix for each head")
        return change(matrix)

    return altered(require(step, "MUL_MAT"), checked)


_QUERY_PARTS, _KEY_PARTS = ("q_pe", "q_nope_absorbed.ggml"), ("k_pe", "kv_cmpr")


def _dropped(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return replace(step, op=Then(step.op, _zeros))


def _zeros(x: Array) -> Array:
    return x * 0


FAULTS = (
    Fault(
        name="latent-norm-missing",
        kinds=("kv_cmpr", "kv_compressed", "attn_q_a_norm"),
        change=_norm_missing,
        what="the latent of {norm} is not normalised",
        symptom="attention is wrong from position 0 on",
        fix="RMS norm of the compressed keys and values (attn_kv_a_norm), and of the queries' latent (attn_q_a_norm)",
        seen="plain low-rank projections taken for MLA",
        parameters={"norm": (_LATENT_NORMS, *((name,) for name in _LATENT_NORMS))},
    ),
    Fault(
        name="latent-norm-whole",
        kinds=("kv_cmpr", "k_pe"),
        change=_norm_of_whole,
        what="the latent's norm covers the part for RoPE as well, whose result {at} are",
        symptom="attention is wrong from position 0 on",
        fix="split the product first, then normalise the latent alone (attn_kv_a_norm)",
        seen="MLA ports that normalise the whole result of attn_kv_a_mqa",
        parameters={AT: (("kv_cmpr", "k_pe"), ("kv_cmpr",))},
    ),
    Fault(
        name="latent-rope-part",
        kinds=(*_QUERY_PARTS, *_KEY_PARTS),
        change=_exchanged_parts,
        what="the rotated part is taken from the front although it comes last, in {at}",
        symptom="attention is wrong from position 0 or 1 on",
        fix="the projection computes the part without position first, then the part for RoPE",
        seen="code for models that rotate a head's first dimensions",
        parameters={AT: ((*_QUERY_PARTS, *_KEY_PARTS), _QUERY_PARTS, _KEY_PARTS)},
    ),
    Fault(
        name="latent-rope-dropped",
        kinds=("q_pe",),
        change=_dropped,
        what="scores lack the part with positions",
        symptom="position 0 is right, later ones are wrong; text is fluent and forgets the order of words",
        fix="a score is the product of the latent parts and that of the rotated ones",
        seen="attention that reads the latent cache alone, as models without a rotated part allow",
    ),
    Fault(
        name="latent-parts-joined",
        kinds=("q_rope", "k_rope"),
        change=_joined_the_other_way,
        what="the rotated part is put in front of the other one, in {at}",
        symptom="scores are wrong from position 1 on",
        fix="queries and keys alike: first the part without position, then the rotated one",
        seen="queries and keys that are assembled in two different places",
        parameters={AT: (("k_rope",), ("q_rope",), ("q_rope", "k_rope"))},
    ),
    Fault(
        name="latent-absorbed",
        kinds=("MUL_MAT",),
        change=_absorbed,
        what="the matrix {weight} that a head multiplies with is {read}",
        symptom="attention is wrong from position 0 or 1 on",
        fix="attn_k_b [heads, latent, part] goes into the queries, attn_v_b [heads, value, latent] after attention: each head has its own",
        seen="attn_kv_b split or transposed a second time: GGUF stores both parts ready to multiply",
        parameters={"read": tuple(_READ), "weight": _ABSORBED},
    ),
)
