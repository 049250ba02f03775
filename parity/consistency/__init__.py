"""`parity consistency`: an engine compared with itself."""
