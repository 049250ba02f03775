"""`parity synth`: models with seeded random weights."""
