"""`parity run --server`: a running server's log-probabilities and choices against llama.cpp's."""
