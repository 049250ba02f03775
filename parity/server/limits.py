"""How far a right server's predictions may be from llama.cpp's."""

from .base import KlFloor

# A right server's worst KL is at most 1.0 times llama.cpp's difference from itself on the same tokens, between float32 and the file's
# own types with an F16 cache: llama-cpp-python's server and llama.cpp's own, Q8_0, texts of 5 to 38 tokens. Other kernels (a GPU's)
# round differently: five times that distance is allowed, and KL grows with its square. A missing BOS is at 80 times this limit.
_TIMES = 25.0
LEAST_LIMIT = 1e-5  # KL: servers print seven digits, and an F16 cache moves an F32 model's by 2e-6


def limit_of(floor: KlFloor) -> float:
    """The largest KL of a right server where llama.cpp differs from itself by `floor`."""
    return max(_TIMES * floor.worst, LEAST_LIMIT)
