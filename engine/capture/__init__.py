"""Copies of values, taken when they are computed."""
