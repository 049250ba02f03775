"""`parity conform`: a matrix of tiny models through an engine, a verdict for each cell, one line for each cause."""
