"""`parity consistency`: an engine against itself."""
