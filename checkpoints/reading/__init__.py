"""Dumps of JSON lines: read in bulk, and line by line what is left."""
