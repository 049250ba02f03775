"""Our side: the engine's run over a prompt, written as a dump."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from checkpoints.columns import open_dump
from checkpoints.points import default_points, layer_outputs, select
from checkpoints.record import ATTENTION_WINDOW, DEFAULT_SLICE, Header, Token
from checkpoints.recording import Recording, passes
from checkpoints.tensors import TensorWriter, beside
from engine import ops
from engine.capture.stages import tap
from engine.capture.tap import Capture
from engine.engine import Engine

from .. import version
from .request import Prompt
from .sequences import computed

TOP = 5  # logits in a token record: enough to see what was nearly chosen


class OursJob(Recording, frozen=True):
    """What our engine has to record. `generated` are the ids that follow the prompt, with their texts; the rest is as in `Prompt`."""

    out: Path
    tokens: tuple[int, ...]
    pieces: tuple[str, ...] = ()
    prompt: str | None = None
    generated: tuple[int, ...] = ()
    generated_pieces: tuple[str, ...] = ()
    portions: tuple[int, ...] = ()
    decoded: tuple[int, ...] = ()
    companions: tuple[tuple[int, ...], ...] = ()
    saved: int = 0
    on_step: Callable[[int, int], None] | None = None

    @classmethod
    def of(
        cls, prompt: Prompt, out: Path, recording: Recording, on_step: Callable[[int, int], None] | None = None
    ) -> "OursJob":
        """The job that records a prompt as asked."""
        return cls(
            out,
            prompt.ids,
            prompt.pieces,
            prompt.text,
            generated=prompt.generated,
            generated_pieces=prompt.generated_pieces,
            portions=prompt.portions,
            decoded=prompt.decoded,
            companions=prompt.companions,
            saved=prompt.saved,
            on_step=on_step,
            **recording.recording(),
        )

    @property
    def as_prompt(self) -> Prompt:
        """The prompt, and how it is to be computed."""
        return Prompt(
            self.prompt,
            self.tokens,
            self.pieces,
            portions=self.portions,
            companions=self.companions,
            saved=self.saved,
            decoded=self.decoded,
        )


def chosen_points(engine: Engine, points: str, layers: tuple[int, ...] | None) -> list[str]:
    """The points that `--points` and `--layers` stand for in this model.

    Raises:
        InputError: a layer or a point that the model does not have.
    """
    if points == "default":
        if layers is None:
            return default_points(engine.points, engine.hp.n_layers)  # without logits for an encoder
        return select(",".join(layer_outputs(layers)), engine.points, engine.hp.n_layers)
    return select(points, engine.points, engine.hp.n_layers)


def header(engine: Engine, job: OursJob) -> Header:
    """The dump's header: everything that could later explain a difference."""
    hp = engine.hp
    window = engine.model.contents.attention_window
    sinks = any(step.op is ops.causal_soft_max and any(step.weights) for step in engine.steps)
    hparams = {"eps": hp.eps, "heads": hp.n_heads, "kv_heads": hp.n_kv_heads, "vocab": hp.n_vocab, "rope_base": hp.rope_base}
    return Header(
        source="engine",
        model=engine.model.info,
        tokens=job.tokens,
        pieces=job.pieces,
        prompt=job.prompt,
        mode=job.mode,
        compute=engine.compute,
        kv_type="f32",
        slice=job.slice_size if job.slice_size is not None else DEFAULT_SLICE,
        hparams={**hparams, **({ATTENTION_WINDOW: window} if window else {}), **({"attention_sinks": True} if sinks else {})},
        build={"version": version(), "backend": engine.backend.name, "device": engine.backend.device},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def dump(engine: Engine, job: OursJob) -> Header:
    """Run the prompt, then one step for each generated token, and write the dump to `job.out`.

    Raises:
        InputError: the model cannot take the tokens, a point is unknown, or the file is unwritable.
    """
    points = chosen_points(engine, job.points, job.layers)
    engine.check(job.tokens + job.generated, job.first_position)
    engine.expect(len(job.tokens + job.generated))
    described = header(engine, job)
    tensors = TensorWriter(beside(job.out)) if job.full else None
    total = len(engine.steps) * (len(passes(len(job.tokens), job.portions)) + len(job.generated))
    done = 0

    with open_dump(job.out, described, binary=job.binary) as writer:
        try:
            with tap(
                writer, points, engine.backend, positions=job.positions, slice_size=job.slice_size, tensors=tensors
            ) as capture:
                if job.on_step is not None:
                    report = job.on_step

                    def count(_name: str) -> None:
                        nonlocal done
                        done += 1
                        report(done, total)

                    capture.on_value = count
                _passes(engine, job, capture)
        except BaseException:
            if tensors is not None:
                tensors.close(complete=False)
            raise
        if tensors is not None:
            tensors.close()
    return described


def _passes(engine: Engine, job: OursJob, capture: Capture) -> None:
    progress, logits = computed(engine, job.as_prompt, job.first_position, capture)
    texts = job.generated_pieces or ("",) * len(job.generated)
    for token, text in zip(job.generated, texts, strict=True):
        capture.token(Token(progress.first + progress.length, token, text, top_logits(logits)))
        logits = engine.forward([token], progress, capture)


def top_logits(logits: NDArray[np.float32], count: int = TOP) -> tuple[tuple[int, float], ...]:
    """The largest logits with their ids, largest first; among equal ones the smaller id comes first, as in llama.cpp's argmax."""
    count = min(count, len(logits))
    candidates = np.argpartition(-logits, count - 1)[:count]
    ranked = sorted(candidates.tolist(), key=lambda i: (-float(logits[i]), i))
    return tuple((int(i), float(logits[i])) for i in ranked)
