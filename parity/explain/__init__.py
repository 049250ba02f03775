"""`parity explain`: which known fault gives a dump's numbers."""
