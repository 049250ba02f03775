"""`parity conform`: a matrix of tiny models through an engine, a verdict a cell, one line a cause."""
