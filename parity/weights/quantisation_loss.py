"""The NMSE that quantising a weight costs, by ggml type: more than that is a wrong weight, not a quantised one."""

# NMSE of libggml's quantisation (ggml_quantize_chunk, importance 1 everywhere): the worst of Gaussian, Laplace, Student-t
# (3 degrees), uniform weights, and of Gaussian ones in which every 64th column is ten times as large, 256 rows of 512
# (tests/test_quantisation_loss.py measures it again).
LOSS = {
    2: 0.025, 3: 0.0087, 6: 0.0066, 7: 0.0021, 8: 0.0001, 10: 0.092, 11: 0.038, 12: 0.0092, 13: 0.0023, 14: 0.00085, 16: 0.38, 17: 0.22,
    18: 0.065, 19: 0.44, 20: 0.014, 21: 0.041, 22: 0.20, 23: 0.014, 29: 0.27, 34: 0.69, 35: 0.69, 39: 0.027, 40: 0.018,
}  # fmt: skip
_ROOM = 2.0  # real weights may have a worse distribution
# Rows in another order give 2, a missing offset of 1 at weights of 0.15 gives 0.98: an error beyond this is not quantisation.
_MOST = 0.9


def largest_loss(kind: int) -> float:
    """NMSE above which a weight of a ggml type is not its quantised source; a type that was not measured counts as the coarsest."""
    return min(_ROOM * LOSS.get(kind, _MOST), _MOST)
