"""A synthetic model in any of llama.cpp's types: made by gguf-py where it can, quantised by llama.cpp where it can't."""

from pathlib import Path

from engine.synth import Shape, synthesize

_BY_GGUF = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def make(out: Path, shape: Shape, *, kind: str, seed: int = 0, tokenizer: Path | None = None) -> None:
    """Write the model to `out`.

    Raises:
        InputError: an impossible shape or type, or an unwritable file.
    """
    if kind.lower() in _BY_GGUF:
        synthesize(out, shape, weight_type=kind, seed=seed, tokenizer=tokenizer)
        return
    from reference.client import Reference

    plain = out.with_name(out.name + ".f32.part")
    try:
        synthesize(plain, shape, weight_type="f32", seed=seed, tokenizer=tokenizer)
        with Reference() as reference:
            reference.quantize(plain, kind, out)
    finally:
        plain.unlink(missing_ok=True)
