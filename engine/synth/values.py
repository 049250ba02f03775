"""Seeded random weights of realistic scale, for tensors of any name.

A matrix is N(0, 1/in); what adds to the residual stream is smaller by sqrt(2 · layers) (GPT-2's initialisation); queries and
keys are half as large, so that scores are like a trained model's (see `dense`); norms are near 1, those of the whole width
with a few strong channels. All other tensors have values like those in trained files.
"""

import re
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from .dense import OUTLIER_SIZE, OUTLIERS, QK_SCALE, SLOWEST_FACTOR

_RESIDUAL = re.compile(
    r"(attn_output|ffn_down(_exps|_shexp|_chexp)?|ssm_out|shortconv\.out_proj|time_mix_output|channel_mix_value)\.weight$"
)
_QUERY_OR_KEY = re.compile(r"attn_(q|k|q_b|k_b|qkv)\.weight$")
_NORM = re.compile(r"norm(_\w+)?\.weight$|_ln\.weight$|post_attention_norm|post_ffw_norm")
# Vectors that are added, mixed or multiplied around 0: biases of selection and of time, sinks, interpolations of RWKV.
_SMALL = re.compile(r"exp_probs_b|sinks|_b$|\.bias$|time_mix_(w0|a0|v0|k_k|k_a|r_k|lerp\w*|first|decay)|channel_mix_lerp|altup")


def values(
    name: str, dims: tuple[int, ...], *, seed: int, layers: int, width: int, qk_norm: float = 1.0
) -> NDArray[np.float32]:
    """The values of one tensor: float32 of its row-major shape, the same for the same name, shape and seed."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    if re.search(r"rope_(freqs|factors\w*)\.weight$", name):
        slowest = SLOWEST_FACTOR**0.5 if "short" in name else SLOWEST_FACTOR
        return np.geomspace(1.0, slowest, dims[-1], dtype=np.float32).reshape(dims)
    normal = rng.standard_normal(dims, dtype=np.float32)
    if re.search(r"\.ssm_a(\.|$)", name):  # A = -exp(A_log): a decay
        decay: NDArray[np.float32] = np.exp(np.float32(0.5) * normal)
        return -decay
    if re.search(r"\.ssm_dt\.bias$", name):  # softplus⁻¹ of time steps between 1e-3 and 0.1, as Mamba is initialised
        step = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), dims))
        return (step + np.log(-np.expm1(-step))).astype(np.float32)
    if re.search(r"\.ssm_d(\.|$)", name):
        return np.float32(1) + np.float32(0.1) * normal
    if _NORM.search(name):
        weight = _norm(normal, rng, strong=dims == (width,))
        return weight * np.float32(qk_norm) if re.search(r"attn_(q|k)_norm\.weight$", name) else weight
    if _SMALL.search(name) or len(dims) == 1:
        return np.float32(0.3) * normal
    scale = 1.0 / np.sqrt(dims[-1])
    if _QUERY_OR_KEY.search(name):
        scale *= QK_SCALE
    if _RESIDUAL.search(name):
        scale /= np.sqrt(2 * layers)
    normal *= np.float32(scale)
    return normal


def _norm(normal: NDArray[np.float32], rng: np.random.Generator, *, strong: bool) -> NDArray[np.float32]:
    weight = np.float32(1) + np.float32(0.1) * normal
    if strong:
        weight[rng.choice(weight.size, min(OUTLIERS, weight.size), replace=False)] *= np.float32(OUTLIER_SIZE)
    return weight
