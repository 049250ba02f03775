"""The points that a recorded graph's nodes, operands and parts stand for."""

from msgspec import Struct, field

from ..ggml import Ggml
from ..jobs import Node, OperandSource
from ..naming import Signer, plan
from .raw import FlatPass, RawTensor


class Names(Struct):
    """The points that stand for nodes, for operands of nodes and for parts of nodes, by index."""

    points: dict[int, str] = field(default_factory=dict)
    operands: dict[int, dict[int, str]] = field(default_factory=dict)
    parts: dict[int, list[tuple[str, int, int]]] = field(default_factory=dict)
    once: set[int] = field(default_factory=set)


def points_of(flat: FlatPass, ggml: Ggml, prefix: str = "") -> Names:
    """The points that a dump of the reference has, with `prefix` in front."""

    def source(raw: RawTensor) -> OperandSource:
        return OperandSource(raw.name, ggml.op_name(raw.op), ggml.type_name(raw.type), raw.ne, raw.address)

    nodes: list[Node] = []
    for raw, sources in zip(flat.tensors[flat.leaves :], flat.sources[flat.leaves :], strict=True):
        operands = tuple(source(flat.tensors[i]) for i in sources if i is not None)
        nodes.append(
            Node(raw.name, ggml.op_name(raw.op), ggml.type_name(raw.type), raw.ne, raw.params, operands, address=raw.address)
        )
    signer = Signer()
    place = {
        signer.sign(node.name, node.op, node.sources[0].name if node.sources else ""): i + flat.leaves
        for i, node in enumerate(nodes)
    }
    names = Names()
    for planned in plan(nodes, prefix=prefix):
        index = place[planned.signature]
        if planned.part is not None:
            names.parts.setdefault(index, []).append((planned.point, *planned.part))
        elif planned.operand is None:
            names.points[index] = planned.point
            if planned.once:
                names.once.add(index)
        else:
            names.operands.setdefault(index, {})[planned.operand] = planned.point
    return names
