"""`parity diff`: one pipeline from two dumps to a verdict."""
