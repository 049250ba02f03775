"""What an isolation says beside its operations, in words."""

from collections.abc import Iterator, Sequence

from checkpoints.answers.isolate import NOT_OBSERVABLE, Operation

from .attention_checks import AttentionChecks


def attention_said(checks: AttentionChecks) -> str:
    """What was shown of attention as a whole."""
    if not checks.layers and not checks.rotations:
        return ""
    parts = []
    if checks.layers:
        parts.append(
            f"in {len(checks.layers)} layers the weights sum to 1, are 0 for later positions, not uniform, and move with the position"
        )
    if checks.rotations:
        parts.append(f"{len(checks.rotations)} rotations change Q or K, and differently at different positions")
    return "; ".join(parts) if not checks.findings else f"{len(checks.findings)} findings"


def not_checked(operations: Sequence[Operation], passes: int, kv_type: str, *, foreign: bool = False) -> Iterator[str]:
    """What this run says nothing of."""
    hidden = [found for found in operations if found.status == NOT_OBSERVABLE]
    if hidden:
        yield f"{len(hidden)} operations that are not observable"
    if passes == 1:
        yield "decode steps" + ("" if foreign else " (--generate 4 adds them)")
    yield "the tokenizer (parity tokens)" + (
        ", and weights as your engine loaded them (parity weights --theirs)" if foreign else ""
    )
    if not foreign and kv_type == "f32":
        yield "a KV cache of F16 (--kv-type f16)"
    if not foreign:
        yield "flash attention and other backends than the CPU"
