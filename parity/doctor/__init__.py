"""`parity doctor`: what is installed, what is missing."""
