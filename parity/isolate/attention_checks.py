"""What attention must do in any engine, whatever its weights: checked on the values themselves."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import parse

from ..diff.limits import FUTURE_MASS
from .values import Value

# A float32 softmax of S weights sums to 1 within S · 2^-24; 1e-5 is that of 168 positions with every error in one direction,
# and 100 times what the embedded model shows (1e-7).
_SUM = 1e-5
# The rows of a softmax that ignores its scores are equal to the bit; the embedded model's differ from uniform by 0.02 at least.
_UNIFORM = 1e-6


@dataclass
class AttentionChecks:
    """Sees the values as they come; `findings` are the sentences of what is wrong, `seen` how many layers were looked at."""

    first: int = 0
    findings: list[str] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    rotations: set[str] = field(default_factory=set)
    _before: dict[str, Value] = field(default_factory=dict)

    def watch(self, arriving: Iterable[tuple[str, Value]]) -> Iterable[tuple[str, Value]]:
        """The same values, looked at on their way."""
        self._before.clear()
        for name, value in arriving:
            point = parse(name)
            if point.layer is not None:
                if point.kind == "kq_soft_max":
                    self.layers.add(point.layer)
                    self.findings += [f"{name}: {said}" for said in soft_max_faults(value.data, value.positions - self.first)]
                elif point.kind in ("q", "k", "q_norm", "k_norm"):
                    self._before[f"blk.{point.layer}.{point.kind[0]}_rope"] = value
                elif name in self._before:
                    before = self._before.pop(name)
                    self.rotations.add(name)
                    self.findings += [f"{name}: {said}" for said in rotation_faults(before, value)]
            yield name, value

    def said(self) -> str:
        """What was shown of attention as a whole."""
        if self.findings:
            return f"{len(self.findings)} findings"
        parts = []
        if self.layers:
            weights = "the weights sum to 1, are 0 for later positions, not uniform, and move with the position"
            parts.append(f"in {len(self.layers)} layers {weights}")
        if self.rotations:
            parts.append(f"{len(self.rotations)} rotations change Q or K, and differently at different positions")
        return "; ".join(parts)


def soft_max_faults(weights: NDArray[np.float32], positions: NDArray[np.int64]) -> list[str]:
    """What is wrong with attention weights [H, T, S] of positions [T] (counted from the first cached one)."""
    wide = weights.astype(np.float64)
    said: list[str] = []
    if not np.isfinite(wide).all():
        return ["weights that are not finite"]
    off = np.abs(wide.sum(axis=2) - 1)
    if off.max() > _SUM:
        h, t = np.unravel_index(int(off.argmax()), off.shape)
        said.append(f"the weights of head {h}, position {positions[t]} sum to {wide[h, t].sum():.6g}, not 1")
    later = np.arange(wide.shape[2])[None, :] > positions[:, None]
    future = np.where(later[None], np.abs(wide), 0).sum(axis=2)
    if future.max(initial=0) > FUTURE_MASS:
        h, t = np.unravel_index(int(future.argmax()), future.shape)
        said.append(f"head {h} at position {positions[t]} looks at later positions (weight {future[h, t]:.3g}): no causal mask")
    count = np.minimum(positions + 1, wide.shape[2])
    many = np.flatnonzero(count > 1)
    uniform = [t for t in many if np.abs(wide[:, t, : count[t]] - 1 / count[t]).max() < _UNIFORM]
    if len(many) and len(uniform) == len(many):
        said.append("every position weighs all positions alike: the scores are not used, or are all equal")
    elif len(many) > 1:
        shortest = int(count[many[0]])
        cut = wide[:, many, :shortest]
        if np.abs(cut - cut[:, :1]).max() == 0:
            said.append("the weights do not change with the position: one row is repeated")
    return said


def rotation_faults(before: Value, after: Value) -> list[str]:
    """What is wrong with a rotation, given Q or K before and after RoPE, [T, n] each."""
    if len(before.positions) != len(after.positions):
        return []
    x = before.data.reshape(len(before.positions), -1).astype(np.float64)
    y = after.data.reshape(len(after.positions), -1).astype(np.float64)
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return []
    change = np.linalg.norm(y - x, axis=1) / np.maximum(np.linalg.norm(x, axis=1), 1e-30)
    moved = np.flatnonzero(after.positions > 0)
    if not len(moved):
        return []
    if change[moved].max() == 0:
        return ["nothing changes under RoPE: it is not applied"]
    if len(moved) > 1 and _one_rotation(x[moved], y[moved]):
        return ["every position is rotated by the same angle: the position does not reach RoPE"]
    return []


def _one_rotation(x: NDArray[np.float64], y: NDArray[np.float64]) -> bool:
    """Whether pairs of rows keep their inner products as they would under one and the same rotation.

    Under RoPE the product of two rows depends on how far their positions are apart, but for rows one after the other that
    would have to be by chance; a common rotation keeps each one to rounding.
    """
    before = np.einsum("ij,ij->i", x[:-1], x[1:])
    after = np.einsum("ij,ij->i", y[:-1], y[1:])
    size = np.linalg.norm(x[:-1], axis=1) * np.linalg.norm(x[1:], axis=1)
    return bool((np.abs(before - after) <= 1e-6 * size).all())
