"""ggml's operations in words: what may be wrong in each, and what kind of operation it is."""

from collections.abc import Iterable, Sequence

from checkpoints.dataflow import CACHE, Computation
from checkpoints.graph import VIEWS

from .dataflow import Flow, Stretch

# Each element of the result is made from the same element of the operands: if those agree as far as they were
# recorded, the operands of a slice are known.
ELEMENTWISE = frozenset(
    {"ADD", "SUB", "MUL", "DIV", "SCALE", "GLU", "UNARY", "CLAMP", "SQR", "SQRT", "CONT", "CPY", "DUP", "REPEAT"}
)
# Their results are chosen by the order of their operands: an error in those need not show.
CHOICES = frozenset({"ARGSORT", "TOP_K", "ARGMAX"})
NORMS = frozenset({"RMS_NORM", "NORM", "L2_NORM", "GROUP_NORM"})
# Products with weights mix a whole row into each element.
MIXING = frozenset({"MUL_MAT", "MUL_MAT_ID", "OUT_PROD"})
_RECURRENT = ("SSM_", "RWKV_", "GATED_", "LINEAR_ATTN", "DELTA")

_NORM = "the norm: {weights}its epsilon"
_WORDS = {
    "RMS_NORM": _NORM,
    "NORM": _NORM,
    "L2_NORM": "the L2 norm: its epsilon, or over which elements",
    "GROUP_NORM": _NORM,
    "ROPE": "RoPE: pairs (halves or neighbours), base, position",
    "SOFT_MAX": "scale, mask or softmax",
    "FLASH_ATTN_EXT": "attention: scale, mask, which key and value head a query head uses, or the cache",
    "ADD": "the addition",
    "SUB": "the subtraction",
    "MUL": "the multiplication",
    "DIV": "the division",
    "SCALE": "the scale",
    "CLAMP": "the bounds",
    "GLU": "the gated activation: which function, or gate and up swapped",
    "UNARY": "the activation function",
    "GET_ROWS": "the table{of_weights}: its dequantisation, its scale or its rows",
    "MUL_MAT_ID": "the experts' product{with_weights}: which experts, their order, or the weight",
    "ARGSORT": "which experts are chosen",
    "TOP_K": "which experts are chosen",
    "CONCAT": "the order of the joined parts",
    "CACHE": "the cache: which rows were written and read",
    "CONT": "the order of the elements",
}


def recurrent(op: str) -> bool:
    """Whether an operation carries a state from position to position."""
    return op.startswith(_RECURRENT) or op in ("SSM_SCAN", "SSM_CONV")


# How a wrong row differs: as far as unrelated values do, less than that, or only in elements that were not recorded.
FAR, NEAR, SOME, BEHIND = "far", "near", "some", "behind"


def suspects(flow: Flow, nodes: Iterable[str], differs: str = FAR, *, everywhere: bool = True) -> str:
    """What may be wrong in the operations that make these nodes (the last one first); empty if nothing is known about them.

    Args:
        differs: FAR, NEAR, SOME or BEHIND. Only rows that are FAR off can be those of a transposed matrix, or of another one, alone.
        everywhere: no position is clearly right. Else it is no weight of a product and no bias, which act at every position.
    """
    known = [name for name in nodes if name in flow.whole.computations]
    of_engine = [name for name in known if not flow.whole.made_by_ggml(name)]
    every = [(name, flow.whole.computations[name]) for name in of_engine or known]
    weights = tuple(dict.fromkeys(weight for _, how in every for weight in how.weights))
    operations = [how.op for _, how in every]
    only_there = not everywhere and any(how.op == "MUL_MAT" and len(how.reads) == 1 for _, how in every)
    named = [weight for weight in weights if weight.endswith(".weight")]
    biases = [weight for weight in weights if weight.endswith(".bias")]
    words: list[str] = []
    for op in dict.fromkeys(operations):
        if op == "MUL_MAT":
            bare = named and not biases and set(operations) <= {op, "CONT", *VIEWS}
            words.append(
                _ONLY_THERE if only_there else _product(every, named, _OF_WEIGHTS[differs] if bare else _OF_SUMS[differs])
            )
        elif op in ("ADD", "MUL") and {"MUL_MAT", "RMS_NORM", "NORM", "GROUP_NORM"} & set(operations) and weights:
            continue  # the bias or the norm's weight: see below
        elif (op in ("CONT", CACHE) or op in VIEWS) and len(operations) > 1:
            continue
        elif op in VIEWS:
            parts = [name for _, how in every if how.op == op for name in how.reads]
            words.append(f"which part of {' or '.join(parts) or 'a value'} it is, or the order of its elements")
        elif op == "GET_ROWS" and not weights:
            words.append("the lookup: which rows it takes, or of which value")
        elif op in _WORDS:
            words.append(
                _WORDS[op].format(
                    weights=_either([*named, *biases]) if named else "its weight or ",
                    of_weights=f" {' and '.join(named)}" if named else "",
                    with_weights=f" with {' and '.join(named)}" if named else "",
                )
            )
        elif recurrent(op):
            words.append(f"the recurrence ({op}): its state, its decay, or the state passed on from pass to pass")
        elif op:
            words.append(f"ggml's {op}")
    if biases and "MUL_MAT" in operations and not only_there:
        words.append(f"the bias {' and '.join(biases)}")
    if CACHE in operations and len(operations) > 1:
        words.append("the cache")
    return ", or ".join(dict.fromkeys(words))


_NOUNS = {
    "RMS_NORM": "the norm", "NORM": "the norm", "L2_NORM": "the norm", "GROUP_NORM": "the norm", "ROPE": "RoPE", "SCALE": "the scale",
    "CLAMP": "the bound", "GLU": "the activation", "UNARY": "the activation", "SOFT_MAX": "the soft max",
}  # fmt: skip


def noun(flow: Flow, stretch: Stretch, unchanged: str) -> str:
    """The name of a stretch's first operation if it leaves `unchanged` as it is, such as "the addition of blk.2.l_out"; else empty."""
    last = flow.whole.computations[stretch.nodes[0]]
    if last.op == "ADD" and unchanged in last.reads:
        return f"the addition of {' and '.join(name for name in last.reads if name != unchanged)}"
    if stretch.unrecorded:
        return ""
    return next(
        (_NOUNS[op] for op in (flow.whole.computations[name].op for name in reversed(stretch.nodes)) if op in _NOUNS),
        "the operation",
    )


_ONLY_THERE = "the product: which row it reads there, or a tile of its kernel (its weights act at every position)"
_OF_WEIGHTS = {
    FAR: "transposed, or another layer's",
    NEAR: "a factor, a summand, or some of its rows or blocks",
    SOME: "some of its rows or blocks, or elements that are overwritten (most of the recorded ones are right)",
    BEHIND: "elements that were not recorded (never written, overwritten, the matrix's last rows)",
}


# The same where a bias, another summand or a bound may be most of the row.
_OF_SUMS = {**_OF_WEIGHTS, NEAR: f"{_OF_WEIGHTS[NEAR]}; {_OF_WEIGHTS[FAR]}, where a bias or a bound outweighs it"}


def _product(every: Sequence[tuple[str, Computation]], named: list[str], of_weights: str) -> str:
    if named:
        return f"the product with {' and '.join(named)}: {of_weights}"
    both = next((how.reads for _, how in every if how.op == "MUL_MAT" and len(how.reads) > 1), ())
    if both:
        return f"the product of {' and '.join(both)}: which key or value head a query head uses, or the heads' order"
    return f"the product: its weight ({of_weights}) or its bias"


def _either(weights: list[str]) -> str:
    return "".join(f"{weight} or " for weight in weights)
