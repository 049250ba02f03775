"""Copies of values, taken the moment they are computed."""
