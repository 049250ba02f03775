"""Changed lists of steps, run against the right list."""
