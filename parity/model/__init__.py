"""`parity model`: what an engine must know of a model."""
