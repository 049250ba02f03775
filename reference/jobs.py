"""What the parent asks of the child and what it gets back: small frozen structs that are sent through the pipe."""

from pathlib import Path
from typing import NamedTuple

from msgspec import Struct, field

from checkpoints.dataflow import Dataflow
from checkpoints.gguf_file import TensorEntry
from checkpoints.record import Header, ModelInfo
from checkpoints.recording import Recording

EXACT = "exact"
NATIVE = "native"


class Tokens(Struct, frozen=True):
    """A tokenized text, and what the vocabulary says about special tokens; llama.cpp's -1 is None here."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    n_vocab: int
    bos: int | None
    eos: int | None
    add_bos: bool
    add_eos: bool
    n_ctx_train: int | None = None
    architecture: str = ""


class OperandSource(Struct, frozen=True):
    """An operand of a node: `ne` is ggml's order, the fastest dimension first; `address` tells it from others of one name."""

    name: str
    op: str
    type: str
    ne: tuple[int, ...]
    address: int = 0


class Node(Struct, frozen=True):
    """One node of the graph as ggml sees it, and the point that it stands for ("" while it has none).

    `op_params` are the 16 raw int32 of `ggml_tensor.op_params` (a float is the same 32 bits); `address` is that of its struct.
    `function` is the one that a UNARY or GLU computes ("GELU", "SWIGLU").
    """

    name: str
    op: str
    type: str
    ne: tuple[int, ...]
    op_params: tuple[int, ...]
    sources: tuple[OperandSource, ...]
    point: str = ""
    address: int = 0
    function: str = ""


class Outline(NamedTuple):
    """What finds a node again in another graph of the model, and its shape: a small part of a `Node`, read ten times as fast."""

    name: str
    op: str
    first: str  # the name of its first operand
    ne: tuple[int, ...]


class DumpJob(Recording, frozen=True):
    """One dump to write.

    Attributes:
        tokens: ids of the prompt, special tokens included.
        pieces: their texts, if the caller has them; else they are looked up.
        generate: how many tokens to choose greedily after the prompt.
        lead: ids to take after the prompt instead of choosing.
        portions: how many of the prompt's tokens each forward pass takes; () for all of them in one.
        ubatch: the most tokens that llama.cpp computes at once within a pass (`n_ubatch`); None for all.
        companions: prompts that are computed in the same pass as other sequences, before this one; they are not recorded.
        saved: how many tokens are computed before the state is saved (`llama_state_get_data`) and restored in a new context.
        decoded: for an encoder–decoder: tokens that the decoder takes after its start token; `portions` then counts these.
        window: "off" (the whole model at once), a number of layers, or "auto" (the whole model if it fits).
        kv_type: "f32", or in native mode also "f16".
    """

    model: Path
    out: Path
    tokens: tuple[int, ...]
    prompt: str | None = None
    pieces: tuple[str, ...] = ()
    generate: int = 0
    lead: tuple[int, ...] | None = None
    portions: tuple[int, ...] = ()
    ubatch: int | None = None
    companions: tuple[tuple[int, ...], ...] = ()
    saved: int = 0
    decoded: tuple[int, ...] = ()
    window: str | int = "auto"
    threads: int | None = None
    kv_type: str = "f32"

    @property
    def passes(self) -> tuple[int, ...]:
        """How many of the prompt's tokens each pass takes, () if one pass takes all."""
        return (self.saved, len(self.tokens) - self.saved) if self.saved else self.portions

    @property
    def plain(self) -> bool:
        """Whether the job is one sequence, in ubatches as large as its passes, in one context."""
        return self.ubatch is None and not self.companions and not self.saved

    @property
    def may_step(self) -> bool:
        """Whether some pass may take a single token, as in any job but a prompt in one pass."""
        return not self.plain or bool(self.portions or self.generate or self.lead)


class DumpResult(Struct, frozen=True):
    """What was written. `generated` are the ids that were decoded after the prompt, `chosen` llama.cpp's own choices."""

    out: Path
    header: Header
    model: ModelInfo
    computed: Path
    n_layers: int
    points: tuple[str, ...]
    records: int
    generated: tuple[int, ...] = ()
    chosen: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    window: int | None = None
    tensors: Path | None = None
    timings: dict[str, float] = field(default_factory=dict)


class Description(Struct, frozen=True):
    """A model as llama.cpp sees it; `points` are (point, row shape) in the order of computation.

    A row shape is written as text, with "t+1" for the positions seen so far; `nodes` are the nodes of those points; `dataflow` is
    that of a dump's header; `rope` says which elements RoPE rotates with each other: "NORM", "NEOX", …, and "" where it rotates none.
    """

    info: ModelInfo
    metadata: dict[str, str]
    n_layers: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_params: int
    points: tuple[tuple[str, tuple[str, ...]], ...]
    nodes: tuple[Node, ...]
    dataflow: Dataflow
    rope: str


class FilePlan(Struct, frozen=True):
    """A GGUF to be written: its table of contents, its tensors in the order of the file, and its bytes in all."""

    header: bytes
    tensors: tuple[TensorEntry, ...]
    size: int
