"""`parity lint`: whether a dump itself is to be believed."""
