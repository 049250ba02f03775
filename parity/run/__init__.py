"""`parity run` and `parity dump`: a prompt through one side or both."""
