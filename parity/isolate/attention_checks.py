"""Laws of attention that hold in any engine, whatever its weights, checked on the values themselves."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from engine import ops
from engine.graph import Step

from ..diff.limits import FUTURE_MASS
from .values import RecordedValue

# A float32 softmax of S weights sums to 1 within S · 2^-24; 1e-5 is that for 168 positions with all errors in one direction,
# and 100 times the embedded model's (1e-7). The root of an operation's limit is never less: that of float32 is 1e-10.
_SUM = 1e-5
# What right operations make of degenerate inputs, too: queries or keys of zero, scores that are all equal or hang on one key.
_UNIFORM_ROWS = "every position weighs all positions alike: the scores are not used, or are all equal"
_ONE_ROW = "the weights do not change with the position: one row is repeated"
_UNTURNED = "nothing changes under RoPE: it is not applied"
_ONE_ANGLE = "every position is rotated by the same angle: the position does not reach RoPE"
_DEGENERATE = frozenset({_UNIFORM_ROWS, _ONE_ROW, _UNTURNED, _ONE_ANGLE})
# The rows of a softmax that ignores its scores are equal to the bit; the embedded model's differ from uniform by 0.02 at least.
_UNIFORM = 1e-6


class Law(Struct, frozen=True):
    """What must hold for attention's weights: `causal`: 0 for later positions; `sinks`: a part of the sum may be missing;
    `whole`: every earlier position is seen.
    """

    causal: bool = True
    sinks: bool = False
    whole: bool = True


class AttentionChecks(Struct):
    """Checks the values as they come.

    Attributes:
        laws: the law of each point with attention's weights, by name.
        turned: the points that RoPE makes, and the point that each is made from.
        off: how far from 1 a row of weights may sum to: weights that are kept in F16 are off by 2^-11 each.
        first: the first position that is cached.
        faults: what looks wrong, each with the point that shows it.
    """

    laws: Mapping[str, Law]
    turned: Mapping[str, str]
    off: float = _SUM
    first: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)
    layers: set[str] = field(default_factory=set)
    rotations: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, steps: Sequence[Step], limit: float) -> "AttentionChecks":
        """The checks of a model's attention; an operation may be off by `limit`, NMSE."""
        laws, turned = {}, {}
        for step in steps:
            if step.op is ops.causal_soft_max:
                window = step.params.get("window", "causal")
                laws[step.makes] = Law(window not in ("all", "symmetric"), any(step.weights), window in ("all", "causal"))
            elif (step.op is ops.rope or getattr(step.op, "name", "") == "ROPE") and isinstance(step.reads[0], str):
                turned[step.makes] = step.reads[0]
        return cls(laws, turned, max(_SUM, float(np.sqrt(limit))))

    def watch(self, arriving: Iterable[tuple[str, RecordedValue]]) -> Iterable[tuple[str, RecordedValue]]:
        """The same values, checked as they pass."""
        wanted = set(self.turned.values())
        before: dict[str, RecordedValue] = {}
        for name, value in arriving:
            if name in self.laws:
                self.layers.add(name)
                faults = soft_max_faults(value.data, value.positions - self.first, self.laws[name], self.off)
                self.faults += [(name, fault) for fault in faults]
            if name in self.turned and self.turned[name] in before:
                self.rotations.add(name)
                self.faults += [(name, fault) for fault in rotation_faults(before[self.turned[name]], value)]
            if name in wanted:
                before[name] = value
            yield name, value

    def settle(self, proven: Collection[str], unknown: Collection[str] = ()) -> None:
        """Take back findings at points that are proven right: there the inputs are degenerate, and no operation is wrong.

        Args:
            unknown: points of which nothing is known: their inputs were not finite, or they were recorded wrong.
        """
        excused = {(name, fault) for name, fault in self.faults if name in unknown or (fault in _DEGENERATE and name in proven)}
        self.faults = [each for each in self.faults if each not in excused]

    @property
    def findings(self) -> list[str]:
        """The sentences of what is wrong."""
        return [f"{name}: {fault}" for name, fault in self.faults]

    def _plain(self) -> bool:
        return all(self.laws[name] == _PLAIN for name in self.layers)

    def sentence(self) -> str:
        """A sentence on what was shown about attention as a whole."""
        if self.faults:
            return f"{len(self.faults)} findings"
        parts = []
        if self.layers:
            weights = "the weights sum to 1, are 0 for later positions, not uniform, and move with the position"
            parts.append(
                f"in {len(self.layers)} layers {weights}" if self._plain() else f"{len(self.layers)} soft maxes hold together"
            )
        if self.rotations:
            parts.append(f"{len(self.rotations)} rotations change Q or K, and differently at different positions")
        return "; ".join(parts)


_PLAIN = Law()


def soft_max_faults(
    weights: NDArray[np.float32], positions: NDArray[np.int64], law: Law = _PLAIN, most: float = _SUM
) -> list[str]:
    """What is wrong with attention weights [H, T, S] of positions [T] (counted from the first cached one); sums may be off by `most`."""
    wide = weights.astype(np.float64)
    faults: list[str] = []
    if not np.isfinite(wide).all():
        return ["weights that are not finite"]
    off = wide.sum(axis=2) - 1
    off = np.maximum(off, 0) if law.sinks else np.abs(off)
    if off.max() > most:
        h, t = np.unravel_index(int(off.argmax()), off.shape)
        faults.append(f"the weights of head {h}, position {positions[t]} sum to {wide[h, t].sum():.6g}, not 1")
    if not law.causal:
        return faults
    later = np.arange(wide.shape[2])[None, :] > positions[:, None]
    future = np.where(later[None], np.abs(wide), 0).sum(axis=2)
    if future.max(initial=0) > FUTURE_MASS:
        h, t = np.unravel_index(int(future.argmax()), future.shape)
        faults.append(
            f"head {h} at position {positions[t]} looks at later positions (weight {future[h, t]:.3g}): no causal mask"
        )
    if law.sinks or not law.whole:
        return faults
    count = np.minimum(positions + 1, wide.shape[2])
    many = np.flatnonzero(count > 1)
    uniform = [t for t in many if np.abs(wide[:, t, : count[t]] - 1 / count[t]).max() < _UNIFORM]
    if len(many) and len(uniform) == len(many):
        faults.append(_UNIFORM_ROWS)
    elif len(many) > 1:
        shortest = int(count[many[0]])
        cut = wide[:, many, :shortest]
        if np.abs(cut - cut[:, :1]).max() == 0:
            faults.append(_ONE_ROW)
    return faults


def rotation_faults(before: RecordedValue, after: RecordedValue) -> list[str]:
    """What is wrong with a rotation, given Q or K before and after RoPE, [T, n] each."""
    if len(before.positions) != len(after.positions):
        return []
    x = before.data.reshape(len(before.positions), -1).astype(np.float64)
    y = after.data.reshape(len(after.positions), -1).astype(np.float64)
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return []
    change = np.linalg.norm(y - x, axis=1) / np.maximum(np.linalg.norm(x, axis=1), 1e-30)
    moved = np.flatnonzero(after.positions > 0)
    if not x[moved].any():
        return []  # zeros, or the first position alone
    if change[moved].max() == 0:
        return [_UNTURNED]
    if len(moved) > 1 and _one_rotation(x[moved], y[moved]):
        return [_ONE_ANGLE]
    return []


def _one_rotation(x: NDArray[np.float64], y: NDArray[np.float64]) -> bool:
    """Whether pairs of rows keep their inner products, as they would if all were rotated alike.

    Under RoPE the product of two rows depends on the distance of their positions, and neighbouring rows keep it only by chance;
    a common rotation keeps every product, up to rounding.
    """
    before = np.einsum("ij,ij->i", x[:-1], x[1:])
    after = np.einsum("ij,ij->i", y[:-1], y[1:])
    size = np.linalg.norm(x[:-1], axis=1) * np.linalg.norm(x[1:], axis=1)
    return bool((np.abs(before - after) <= 1e-6 * size).all())
