"""The face: comparator, diagnosis, commands."""
