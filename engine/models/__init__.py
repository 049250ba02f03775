"""One file per architecture: its list of steps."""
