"""Two dumps side by side: their tokens, positions and records, and how far these are apart."""
