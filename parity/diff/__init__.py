"""`parity diff`: two dumps through one pipeline to a verdict."""
