"""`parity lint`: whether a dump itself can be trusted."""
